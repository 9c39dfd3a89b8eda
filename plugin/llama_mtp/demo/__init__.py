"""The demo model: SmolLM2-135M-Instruct joined with a NextN head trained for it."""
