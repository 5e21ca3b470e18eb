"""Where the CPU time of a task goes: by process, by layer, and against what the machine cannot do cheaper."""
