"""Do untrained transformers hold selective neurons, and do these persist when the model is trained?"""
