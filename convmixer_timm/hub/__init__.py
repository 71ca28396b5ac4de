"""Models packed, described, published on the Hugging Face Hub, and verified."""
