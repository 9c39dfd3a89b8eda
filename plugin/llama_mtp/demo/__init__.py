"""The demo model: SmolLM2-135M-Instruct joined with a NextN head that was trained for it."""
