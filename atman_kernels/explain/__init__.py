"""Questions asked of a model, and their answers: which units of a prompt an answer rests on."""
