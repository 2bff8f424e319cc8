"""`e2sci bench exactness`: is the text of every lossless method the target's own?

Answers prompts by real processes in the cells of a pairwise-covering design (every two levels of
different factors occur together in some cell) and compares token ids.

`design` says which cells; it knows no processes. `answers` gets the answers, of cells and of the
target alone. `judge` compares them; it sees models only through questions it asks. `run` puts them
together and prints.
"""
