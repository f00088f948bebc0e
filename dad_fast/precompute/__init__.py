"""Fill a store: adversarial images and teacher outputs, computed once."""
