"""What a trained model is worth: likelihoods of text, standard tasks, bits a byte, probes of its memory."""
