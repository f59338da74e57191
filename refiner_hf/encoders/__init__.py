"""The attention maps of transformers' own encoders, refined."""
