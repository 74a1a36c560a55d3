"""From a model and prompts to committed parts: models, plan, capture, statistics, pipeline. Imports torch."""
