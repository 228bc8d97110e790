"""What a person runs: the `clora` command and its continual-learning studies. Importing this loads none of them."""
