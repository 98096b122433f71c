"""This node among the others: finding, founding, entering and leaving a cluster."""
