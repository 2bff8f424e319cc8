"""Training of speculators: small weights that draft from a target's hidden states.

The target answers prompts by itself, its hidden states at these texts are kept, and a module learns
to foresee the tokens of the answers. What comes out is a directory that
`engines.torch.speculators` runs.
"""
