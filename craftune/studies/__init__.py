"""Small studies on the one loop: unconditional pictures, layouts, molecules. Minutes on a CPU."""
