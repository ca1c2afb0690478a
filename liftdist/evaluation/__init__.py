"""Evaluations of a model during a run, one per file: ``run(context, inputs, model, method, step)``; and tasks.

:data:`liftdist.registry.EVALUATIONS` lists them. Of a task :mod:`liftdist.evaluation.questions` has the questions,
:mod:`liftdist.evaluation.scorers` what an answer is worth, :mod:`liftdist.runs.results` the files.
:mod:`liftdist.evaluation.candidates` asks what deltas make of a model, and :mod:`liftdist.evaluation.soup` chooses among them.

In: a model, sharded or not, inputs, and the method that trains it. Out: metrics by tag. Must leave the model as it was, and not
know checkpoints.
"""
