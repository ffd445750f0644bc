"""Measuring the kernels and their peers: behind ``python -m diveq_kernels bench`` and a checkout's ``benchmarks/``.

One case (an operation at a shape), several contestants, one rule: what fails its check gets no speed.

| module        | what it holds                                                             |
|---------------|---------------------------------------------------------------------------|
| `cases`       | operations, shapes, inputs, the least work and traffic of a case          |
| `contestants` | this package's backends as contestants                                    |
| `peers`       | plain torch and the packages that do the same                             |
| `verify`      | a contestant's result against float64                                     |
| `measure`     | time and memory                                                           |
| `machine`     | the device, versions, and its measured ceilings                           |
| `running`     | a case with all its contestants, as a record                              |
| `command`     | the command's arguments and table                                         |
"""
