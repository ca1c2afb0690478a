"""Deltas served by vLLM: a model name each, exchanged in the running engine between groups of requests.

In: a base model and deltas of it. Out: vLLM's own server. `launch` and `examples` run where liftdist is installed; all else runs
in vLLM's processes, with its torch, and must not know how a delta was made.

    launch      checks base and deltas, then becomes vLLM's Python
    examples    files of what models are asked, read
    main        vLLM's command line, with the engine below
    engine      vLLM's engine as its API server sees it: a request waits for its turn; a swap between turns
    turns       whose turn it is
    worker      what each of vLLM's workers can do besides: load a delta, switch from one to another
    routing     which of the models a text is for, by examples
    router      vLLM's API server with the model auto, which is the one that a request's text is for
    placement   where a delta's weights lie in a model that vLLM has loaded
"""
