"""How what is asked is answered: variants in packs or as full rows."""
