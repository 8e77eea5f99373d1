"""The plain modern way: SuperNodes, and a ClientApp that trains at each message."""
