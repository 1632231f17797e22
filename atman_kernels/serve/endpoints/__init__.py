"""One file per protocol; each turns what came into a request of ours, and the result into what is expected back."""
