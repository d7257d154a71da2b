"""The same stage on one worker or a thousand (Waver §5): applied to the model from outside."""
