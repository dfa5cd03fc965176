"""What engines share: the protocol between frontend and worker, model cards, tokenizers, registration."""
