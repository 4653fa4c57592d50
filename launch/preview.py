"""What a study would do, before it does it: sizes, schedule, optimizer table, text, programs and cost. Computes no update and writes nothing."""

from typing import Any

from moe_jax.errors import DataError
from moe_jax.model import Model
from moe_jax.optim.plan import plan
from moe_jax.plan.costs import describe as describe_costs
from moe_jax.rl.config import RLConfig
from moe_jax.studies.run import Experiment
from moe_jax.train.data import describe
from moe_jax.train.loop import RunConfig
from moe_jax.train.writers import duration_text

# Sustained matmul rates behind the cost estimate, FLOP/s: two CPU cores of the Zen 4 class (float32, measured), and 40 % of an H100's
# 989e12 in bfloat16.
RATES = {"two CPU cores": 1.3e11, "one H100": 0.4 * 989e12}


def preview(experiment: Experiment) -> str:
    """The study in words and numbers, those of its first run where its runs differ."""
    configs = experiment.configs()
    first = configs[0]
    if isinstance(first, RLConfig):
        return _rl_preview(experiment, configs)
    model = Model(first.model)
    trains = experiment.measure is None
    lines = [
        f"study       {experiment.name}: {experiment.design.question}",
        f"runs        {len(configs)} = {len(experiment.design.cells())} cells x seeds {', '.join(map(str, experiment.design.seeds))}",
        *(_programs(configs) if trains else ["programs    nothing is trained: forward passes alone"]),
        f"rule        {experiment.design.rule}",
        *(f"note        {note}" for note in experiment.design.notes),
        "",
        f"model       {model.parameter_count():,} parameters, {model.active_parameter_count():,} active per token; begins with "
        f"{first.start or 'fresh parameters'}",
        *(_training(first, model) if trains else [f"noise       {first.noise or 'none'} (the first run's)"]),
        "",
        "text",
        *_text(first),
        "",
        *_cost(experiment, configs if trains else [], model),
        *(_plan(first) if trains else []),
        *_launch(experiment),
    ]
    return "\n".join(lines)


def _rl_preview(experiment: Experiment, configs: list[RLConfig]) -> str:
    """A study of reinforcement learning."""
    first = configs[0]
    lines = [
        f"study       {experiment.name}: {experiment.design.question}",
        f"runs        {len(configs)} = {len(experiment.design.cells())} cells x seeds {', '.join(map(str, experiment.design.seeds))}",
        f"rule        {experiment.design.rule}",
        *(f"note        {note}" for note in experiment.design.notes),
        "",
        f"task        {first.task}; prompts up to {first.prompt_tokens} tokens, answers up to {first.response_tokens}; {_problems(first)}",
        f"training    {first.steps} steps of {first.prompts} problems x {first.samples} answers, {first.mini_batches} updates each of "
        f"{first.accumulation} x {first.rows} answers",
        f"evaluation  {first.eval_problems} problems of {first.eval_split}, greedy and {first.eval_samples} times sampled, noise off and on, every "
        f"{first.eval_every} steps",
    ]
    flops = 0.0
    for shape in dict.fromkeys(config.model for config in configs):
        model, runs = Model(shape), [config for config in configs if config.model == shape]
        tokens = sum(config.steps * config.answers * config.length for config in runs)
        flops += 2.0 * model.active_parameter_count() * tokens * 5  # sampling, a pass before the updates, an update
        lines += [
            "",
            f"model       {model.parameter_count():,} parameters, {model.active_parameter_count():,} active per token, {len(runs)} runs",
        ]
        lines += [plan(model.specs, runs[0].optimizer).table()]
    lines += [
        "",
        f"cost        {experiment.cost}",
        f"            about {flops:.2e} FLOPs of matmuls in sampling and training, if every answer took all its tokens; warm-up, evaluations and "
        "attention's scores not counted",
    ]
    return "\n".join([*lines, *_launch(experiment)])


def _problems(config: RLConfig) -> str:
    try:
        task = config.load_task()
    except DataError as error:
        return f"its problems not counted: {error}"
    left_out = f"{task.repeats:,} repeated questions left out"
    return f"{len(task.train):,} problems to train on, {len(task.tune):,} to tune, {len(task.test):,} to test; {left_out}"


def _programs(configs: list[RunConfig]) -> list[str]:
    structures = {config.structure() for config in configs}
    return [f"programs    {len(structures)} structure(s), each compiled once for training and once for evaluation"]


def _training(config: RunConfig, model: Model) -> list[str]:
    optimizer = plan(model.specs, config.optimizer)
    return [*_steps(config), *_learning_rates(config, optimizer), "", "optimizer (the first run's)", optimizer.table()]


def _plan(config: RunConfig) -> list[str]:
    """Memory and time of the step on usual slices, by the plan's models."""
    return [
        "",
        "by memory model and roofline, whatever the network between devices (launch.plan looks at it, and compiles the step)",
        describe_costs(config),
    ]


def _launch(experiment: Experiment) -> list[str]:
    """The command for each machine that the study says it was made for."""
    lines = [f"  {machine}\n    {command}" for machine, command in experiment.launch.items()]
    return ["", "launch", *lines] if lines else []


def _steps(config: RunConfig) -> list[str]:
    data = config.data
    per_update = data.accumulation * data.batch_size
    return [
        f"training    {config.updates * data.accumulation} micro-batches of {data.batch_size} x {data.seq_len} tokens, {config.updates} updates "
        f"of {per_update} sequences = {per_update * data.seq_len:,} tokens",
        f"noise       {config.noise or 'none'} (the first run's); balance weight {config.balance_weight} per layer, "
        f"layers reduced by {config.objective.layer_reduction}",
    ]


def _learning_rates(config: RunConfig, optimizer) -> list[str]:
    last = config.updates - 1
    wanted = sorted({0, min(20, last), last // 2 + 1 if last > 1 else last, last} | ({50} if last >= 50 else set()))
    lines = ["rate at update " + "".join(f"{update:>12}" for update in wanted)]
    for label in ("muon", "adamw"):
        rates = [float(optimizer.learning_rate(update)[label]) for update in wanted]
        lines.append(f"  {label:<13}" + "".join(f"{rate:>12.6f}" for rate in rates))
    return lines


def _text(config: RunConfig) -> list[str]:
    try:
        found: dict[str, Any] = describe(config.data, config.data_seed, config.updates)
    except DataError as error:  # such as a tokenizer that comes with weights which are not here yet
        return [f"  {config.data.source}, windows of {config.data.seq_len} tokens; not counted: {error}"]
    shown = {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
        for name, value in found.items()
    }
    width = max(len(name) for name in shown)
    return [f"  {name.replace('_', ' '):<{width}}  {value}" for name, value in shown.items()]


def training_flops(config: RunConfig, model: Model) -> float:
    """FLOPs of a run's forward and backward passes: 6 per active parameter and token, plus causal attention. Evaluation and Muon are not in it."""
    data, shape = config.data, config.model
    tokens = config.updates * data.accumulation * data.batch_size * data.seq_len
    attention = 6 * shape.num_layers * shape.num_heads * shape.head_width * data.seq_len  # QK and AV, half of S*S visible, three passes
    return tokens * (6.0 * model.active_parameter_count() + attention)


def _cost(experiment: Experiment, configs: list[RunConfig], model: Model) -> list[str]:
    if not configs:
        return [f"cost        {experiment.cost}"]
    total = sum(training_flops(config, model) for config in configs)
    first, *rates = cost_lines(total)
    return [f"cost        {experiment.cost}", *(f"            {line}" for line in (f"{first} in all runs; at a sustained", *rates))]


def cost_lines(flops: float) -> list[str]:
    """What so many FLOPs are, and how long they take on known machines."""
    return [f"{flops:.2e} FLOPs of training"] + [
        f"{rate / 1e12:g} TFLOP/s ({name}): {duration_text(flops / rate)}, evaluation and Newton-Schulz not counted"
        for name, rate in RATES.items()
    ]
