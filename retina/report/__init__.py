"""Pages to send: one HTML file that needs no server and asks for nothing. Beside the road."""
