"""What several analyses need: interventions, the logit lens, metrics, selectivity, significance, figures, reports."""
