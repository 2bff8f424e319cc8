"""The dashboard: Redis → data frames → plotly figures, shown by Streamlit.

`app` lays the page out, `data` reads Redis, `frames` keeps and bins what was read, `charts` draws,
`glossary` explains the words. None of them knows ZeroMQ or models.
"""
