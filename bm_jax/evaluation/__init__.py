"""What a trained model is worth: likelihoods of text, standard tasks, bits per byte, probes of its memory."""
