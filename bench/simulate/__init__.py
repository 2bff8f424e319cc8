"""`e2sci bench simulate`: both state machines on a virtual clock, for devices that are not here.

Nothing in here is measured, and every figure says *simulated*.

| module | what |
|---|---|
| `device` | what draft steps, passes and messages take, fitted to measured sessions |
| `cores` | two models that slow each other down |
| `pair` | one session between an edge and a cloud |
| `predict` | tokens a second of a method on many answers |
| `run` | tables: a device class, or a measured run beside its prediction |
"""
