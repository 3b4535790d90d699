"""The offline demo: drawn flowers, and the tiny MaxViT's pretraining on them."""
