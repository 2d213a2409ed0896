"""The model, as it travels to the Hub next to its weights. Imports only torch, transformers and its own siblings."""
