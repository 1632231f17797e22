"""An HTTP service that explains one model: docs/service.md says what it speaks, docs/deployment.md how it is run.

A request is checked and measured where it came in, waits its turn in `waiting`, and is worked on by the one thread of
`worker`, which alone touches the model; `engine` turns requests into calls of the library. What becomes known meanwhile
goes back as the events of a `job`. `endpoints` has one file per protocol, and none of them knows the others.
"""
