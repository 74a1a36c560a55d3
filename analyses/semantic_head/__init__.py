"""Why does one attention head (gpt2-small's L1H5) attend to its token's semantic category, and away from its copies?"""
