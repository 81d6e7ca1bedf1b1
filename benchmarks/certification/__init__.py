"""What certificates cost, and attacks that try to break them."""
