"""Says what a `Planner` worked out: tables, advice, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from launch.plan_model import hidden_of
from launch.plan_own import OwnPlanner
from launch.planning import GIB, Planner
from mm_moe.moe.layer import moe_layers
from mm_moe.training import exchange
from mm_moe.training.estimate import Memory

MIB = 1 << 20
HBM_RATIO = 300  # operations per byte from which a bf16 product of an H100 is bound by arithmetic
BIG_HOST = 64 * GIB  # of one process, while the model is built


def work_out(planner: Planner) -> dict[str, Any]:
    """Everything as plain values; bytes and seconds are those of one process."""
    samples = planner.settings.training.per_device_train_batch_size
    stages = {}
    for stage in planner.stages:
        over = planner.overlay(planner.zero(stage))
        memory = planner.memory(samples, over)
        stages[stage] = {
            **_bytes(memory),
            "fits": planner.needed(samples, over) <= planner.machine.memory,
            "start": over.start,
            "largest_micro_batch": planner.largest(over),
        }
    zero = planner.zero(planner.own_stage)
    traffic = planner.traffic(zero, samples)
    return {
        "model": _model(planner),
        "processes": planner.machine.world_size,
        "gpus_per_node": planner.machine.gpus_per_node,
        "gpu": planner.machine.gpu,
        "usable_memory": planner.machine.memory,
        "ep_size": planner.ep_size,
        "precision": "bf16" if planner.half else "float32",
        "micro_batch": samples,
        "rows": planner.rows(samples),
        "accumulation": zero.accumulation,
        "text_tokens": dataclasses.asdict(planner.texts),
        "parameters": {name: dataclasses.asdict(count) for name, count in planner.counts.items()},
        "own_stage": planner.own_stage,
        "memory": stages,
        "with_activation_checkpointing": _recomputed(planner, samples),
        "host_bytes_while_building": planner.build_bytes,
        "traffic": {name: dataclasses.asdict(part) for name, part in traffic.items()},
        "flops_per_step": planner.flops(samples),
        "time": _time(planner, traffic, samples),
        "notes": planner.notes,
    }


def _model(planner: Planner) -> dict[str, str]:
    """What the model is."""
    if isinstance(planner, OwnPlanner):
        return {"type": planner.config.model_type}
    return {"backbone": planner.config.backbone, "prompt": planner.config.prompt}


def _recomputed(planner: Planner, samples: int) -> dict[str, Any] | None:
    """Bytes if every block is computed twice; None for a model without blocks."""
    if isinstance(planner, OwnPlanner):
        return None
    again = planner.timeline(recompute_every=1)
    over = planner.overlay(planner.zero(planner.own_stage), again)
    return _bytes(planner.memory(samples, over, again))


def _bytes(memory: Memory) -> dict[str, Any]:
    return {**dataclasses.asdict(memory), "device": memory.device}


def _time(
    planner: Planner, traffic: dict[str, exchange.Traffic], samples: int
) -> dict[str, float] | None:
    """Lower bounds of the step, and of the experts alone; None without a known rate."""
    if planner.machine.is_cpu:
        return None
    rate, links = planner.peak_rate(), planner.machine.links
    bound = exchange.step_time(traffic, flops=planner.flops(samples), peak=rate, links=links)
    per_step = samples * planner.machine.world_size
    per_step *= planner.settings.training.gradient_accumulation_steps
    return {
        "compute_s": bound.compute,
        "exchange_s": bound.exchange,
        "exchange_to_compute": bound.ratio,
        "least_s_overlapped": bound.overlapped,
        "least_s_serial": bound.serial,
        "samples_per_s_at_most": per_step / bound.overlapped if bound.overlapped else 0.0,
        "balance_hidden_width": exchange.balance_width(
            ep_size=planner.ep_size,
            gpus_per_node=planner.machine.gpus_per_node,
            peak=rate,
            links=links,
            element=2 if planner.half else 4,
        ),
    }


def report(planner: Planner, file: Path | None) -> None:
    """Print the plan, and store it."""
    found = work_out(planner)
    found["advice"] = advice(planner, found)
    for line in [*head(found), *parameters(found), *memory(found), *traffic(found)]:
        print(line)
    print("\nadvice")
    for line in found["advice"]:
        print(f"  - {line}")
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwritten to {file}")


def head(found: dict[str, Any]) -> list[str]:
    """What is planned."""
    rows = ", ".join(f"{count} {name}" for name, count in found["rows"].items())
    texts, words = found["text_tokens"], ""
    if texts["padded"]:
        words = f"; texts padded to {texts['padded']} tokens, {texts['real']:.4g} of them real"
    return [
        f"{found['processes']} process(es), {found['gpus_per_node']} per node, on {found['gpu']} "
        f"with {size(found['usable_memory'])} usable; experts over {found['ep_size']}; "
        f"{found['precision']}; {found['own_stage']}",
        f"micro-batch {found['micro_batch']} x {found['accumulation']} accumulation; rows: {rows}"
        + words,
        *found["notes"],
    ]


def parameters(found: dict[str, Any]) -> list[str]:
    """Parameters by part."""
    lines = ["", f"{'parameters':14}{'dense':>14}{'expert':>14}{'active':>14}{'trainable':>14}"]
    columns = ("dense", "expert", "active", "trainable")
    rows = {**found["parameters"]}
    rows["all"] = {
        column: sum(part[column] for part in found["parameters"].values()) for column in columns
    }
    for name, part in rows.items():
        lines.append(f"  {name:12}" + "".join(f"{part[column]:14,}" for column in columns))
    frozen = rows["all"]["dense"] + rows["all"]["expert"] - rows["all"]["trainable"]
    lines.append(
        f"  frozen {frozen:,}; active: dense ones and the experts of one token in each part, "
        "so the line 'all' is what a sample with every modality passes"
    )
    return lines


def memory(found: dict[str, Any]) -> list[str]:
    """Bytes of one process by stage."""
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "device", "host")
    lines = ["", f"{'memory of one process':22}" + "".join(f"{name:>13}" for name in names)]
    lines[-1] += f"{'largest batch':>15}"
    for stage, row in found["memory"].items():
        mark = "*" if stage == found["own_stage"] else " "
        fits = "" if row["fits"] else "  does not fit"
        cells = "".join(f"{size(row[name]):>13}" for name in names)
        lines.append(f"{mark} {stage:20}{cells}{row['largest_micro_batch']:15,}{fits}")
    again = found["with_activation_checkpointing"]
    own = found["memory"][found["own_stage"]]
    twice = []
    if again is not None:
        twice.append(
            f"  every block computed twice (--activation_checkpointing): activations "
            f"{size(again['activations'])}, device {size(again['device'])}"
        )
    return [
        *lines,
        f"  at the moment that needs most ({own['when']}); * is the DeepSpeed file's stage",
        *twice,
        f"  host memory of a process while it builds the model, all experts in float32: "
        f"{size(found['host_bytes_while_building'])}",
    ]


def traffic(found: dict[str, Any]) -> list[str]:
    """Bytes of one step, and what they mean for its time."""
    lines = ["", f"{'sent by one process per step':30}{'on the node':>15}{'off the node':>15}"]
    for name, part in found["traffic"].items():
        lines.append(f"  {name:28}{size(part['near']):>15}{size(part['far']):>15}")
    lines.append(f"  {found['flops_per_step'] / 1e12:.4g} TFLOP per step and process")
    time = found["time"]
    if time is not None:
        lines.append(
            f"  at peak rates: compute {time['compute_s'] * 1e3:.3g} ms, exchange "
            f"{time['exchange_s'] * 1e3:.3g} ms (ratio {time['exchange_to_compute']:.3g}); no step "
            f"is faster than {time['least_s_overlapped'] * 1e3:.3g} ms, without overlap "
            f"{time['least_s_serial'] * 1e3:.3g} ms"
        )
    return lines


def advice(planner: Planner, found: dict[str, Any]) -> list[str]:
    """What to change, from the numbers; each line stands alone."""
    lines = [*_fit(found), *_layout(planner, found), *_buckets(planner, found)]
    local = found["gpus_per_node"] * found["host_bytes_while_building"]
    if found["host_bytes_while_building"] > BIG_HOST:
        lines.append(
            f"each process builds all experts before it keeps its own: a node needs {size(local)} "
            "of host memory at the start."
        )
    return lines or ["nothing to change: it fits, and the exchange is small beside the arithmetic."]


def _fit(found: dict[str, Any]) -> list[str]:
    own, batch = found["memory"][found["own_stage"]], found["micro_batch"]
    if own["fits"]:
        most = own["largest_micro_batch"]
        if found["accumulation"] > 1 and most >= 2 * batch:
            factor = math.gcd(found["accumulation"], most // batch)
            if factor > 1:
                return [
                    f"micro-batches of {batch * factor} fit: take --gradient_accumulation_steps "
                    f"{found['accumulation'] // factor} for the same step with less exchange."
                ]
        return []
    lines = []
    for stage, row in found["memory"].items():
        if row["fits"]:
            lines.append(f"{found['own_stage']} does not fit, {stage} does: take its file.")
            break
    most = own["largest_micro_batch"]
    if most:
        lines.append(
            f"--per_device_train_batch_size {most} fits; with --gradient_accumulation_steps "
            f"{math.ceil(batch / most)} a step has as many samples."
        )
    best = max(row["largest_micro_batch"] for row in found["memory"].values())
    if not best:
        lines.append(
            "not one sample fits at any stage: more processes with a larger ep_size spread experts "
            "and optimizer state, --lock_image and --lock_text drop gradients and state."
        )
    return lines


def _layout(planner: Planner, found: dict[str, Any]) -> list[str]:
    """Where the experts should be."""
    time, layers = found["time"], list(moe_layers(planner.model).values())
    if not layers or time is None:
        return []
    lines = []
    near, hidden = found["gpus_per_node"], min(hidden_of(layer) for layer in layers)
    width = time["balance_hidden_width"]
    if found["ep_size"] > 1 and found["traffic"]["expert all-to-all"]["far"] > 0:
        inside = math.gcd(near, *(layer.num_experts for layer in layers))
        lines.append(
            f"ep_size {found['ep_size']} reaches over nodes of {near}: an expert of hidden width "
            f"{hidden} would need {width:,.0f} to compute as long as its rows travel "
            f"({width / hidden:.2g} times the arithmetic); take --ep_size {inside}."
        )
    elif width > hidden:
        lines.append(
            f"the exchange of rows takes {width / hidden:.2g} times as long as the experts' "
            "arithmetic at peak rates."
        )
    lines += _without_exchange(planner, found)
    samples = found["micro_batch"]
    rows = min(
        layer.top_k * layer.tokens * found["ep_size"] / module.num_experts
        for layer, module in zip(planner.sparse_layers(samples), layers, strict=True)
    )
    if rows < HBM_RATIO:
        lines.append(
            f"an expert sees about {rows:.0f} rows of a micro-batch; below about {HBM_RATIO} it "
            "waits for its weights instead of computing: larger micro-batches, or fewer experts."
        )
    return lines


def _without_exchange(planner: Planner, found: dict[str, Any]) -> list[str]:
    """Whether all experts on every process fit: then nothing has to travel."""
    if found["ep_size"] == 1:
        return []
    zero = dataclasses.replace(planner.zero(found["own_stage"]), ep_size=1)
    if planner.needed(found["micro_batch"], planner.overlay(zero)) > planner.machine.memory:
        return []
    now = sum(_seconds(part, planner) for part in found["traffic"].values())
    other = planner.traffic(zero, found["micro_batch"])
    then = sum(part.seconds(planner.machine.links) for part in other.values())
    if then >= now:
        return []
    return [
        f"--ep_size 1 fits too and exchanges less ({then * 1e3:.3g} ms a step for "
        f"{now * 1e3:.3g} ms at full rates)."
    ]


def _seconds(part: dict[str, float], planner: Planner) -> float:
    return exchange.Traffic(**part).seconds(planner.machine.links)


def _buckets(planner: Planner, found: dict[str, Any]) -> list[str]:
    """A bucket that is larger than everything that goes through it."""
    zero = planner.zero(found["own_stage"])
    gradients = sum(group.size for group in planner.groups(zero))
    if not zero.stage or zero.reduce_bucket_size < 2 * gradients:
        return []
    spare = (zero.reduce_bucket_size - gradients) * zero.element
    if spare < 64 * MIB:
        return []
    return [
        f"reduce_bucket_size {zero.reduce_bucket_size:,} is more than all {gradients:,} gradients "
        f"of a process: setting it to {math.ceil(gradients / 1e6) * 1_000_000:,} in the DeepSpeed "
        f"file saves {size(spare)}."
    ]


def size(value: float) -> str:
    """Bytes for people."""
    if value >= GIB:
        return f"{value / GIB:.2f} GiB"
    return f"{value / MIB:.1f} MiB" if value else "0"
