"""Sharded, streaming, exactly resumable image input; knows nothing of training or clusters."""
