"""How a bank is scanned: likely rows with rigorous bounds on their similarities."""
