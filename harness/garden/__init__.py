"""The offline demo: drawn flowers, and how the tiny MaxViT's weights are made of them."""
