"""cfpretrain: pre-training of CausalFusion, causal diffusion transformers.

Reference: "Causal Diffusion Transformers for Generative Modeling", arXiv 2412.12095.

Shape legend. A tensor's name ends in the letters of its axes:

    B  samples of a batch           L  tokens of an image (patches of the latent grid)
    M  tokens of a sequence         N  noised tokens in this call
    K  keys of an attention         C  channels of a latent
    D  width of the model           H  heads
    E  head width                   P  values of a patch: patch_size * patch_size * C
    S  AR steps                     Q  condition tokens
    T  diffusion timesteps, or tokens of a text
    I  the four integers of a visibility interval
    Y  rows of a latent             X  columns of a latent
    V  tokens of a vocabulary

`clean_BLP` is then a batch of clean image tokens, `intervals_BMI` the visibility of its sequence.
"""

__version__ = "0.1.0"
