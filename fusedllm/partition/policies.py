"""The policies by name: what each claims, what the accelerator sees, and how one is put over a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import jax

from fusedllm.errors import PolicyError
from fusedllm.model.params import Params
from fusedllm.model.placement import Placement
from fusedllm.partition.hosted import Boundary, Hosted
from fusedllm.partition.in_program import VIAS, InProgram
from fusedllm.partition.integer import IntegerBoundary, integer_product
from fusedllm.partition.ledger import Ledger
from fusedllm.partition.link import Driven, Link, Product
from fusedllm.partition.pad_supply import PadReport
from fusedllm.partition.plain import Plain
from fusedllm.partition.sharded import Sharded
from fusedllm.partition.split import Split, clear_product
from fusedllm.partition.views import Label

# The forms of a crossing: the host launches each product, or one program asks the host for what it multiplies next.
CROSSINGS = ("driven", *VIAS)

NO_CLAIM = "no confidentiality claim"


@dataclass(frozen=True, slots=True)
class Policy:
    """A row of the table in `docs/trust.md`.

    Attributes:
      name: what the user calls it.
      trusted: what the trusted side does.
      seen: what whoever runs the accelerator sees.
      claim: what is kept from them, or `NO_CLAIM`.
      leaks: the secrets that operations of the accelerator see (`views.py`; a test compares).
      crosses: whether products run on another device than the rest.
      integers: whether they are sums of integers, as those of `w8a8` are.
    """

    name: str
    trusted: str
    seen: str
    claim: str
    leaks: frozenset[Label] = frozenset()
    crosses: bool = False
    integers: bool = False

    @property
    def platform(self) -> str | None:
        """On which everything but the products runs: the CPU, or `None` for the default backend."""
        return None if self.name == "plain" else "cpu"


# What every policy leaks to whoever runs the accelerator, however well it hides the rest. How many rows cross tells how
# much of a prompt is in the prefix cache.
LEAKS = "lengths, timing, the number of tokens and which prompts begin alike leak"
_HIDDEN = "prompt, activations and output are secret as far as the pads' cipher is"

_REST = "everything but the products with weights: embedding, attention, KV cache, scales, sampling"

_ACTIVATIONS = frozenset({Label.ACTIVATIONS})
_EVERYTHING = _ACTIVATIONS | {Label.PROMPT, Label.KV_CACHE, Label.OUTPUT}

POLICIES = {
    policy.name: policy
    for policy in (
        Policy("plain", "nothing", "weights, prompt, activations and output", NO_CLAIM, _EVERYTHING),
        Policy(
            "split",
            _REST,
            "weights, and the activations of every product in the clear",
            NO_CLAIM,
            _ACTIVATIONS,
            crosses=True,
        ),
        Policy(
            "masked",
            _REST,
            "weights, and integers that are uniform over the ring modulo 2^32",
            f"{_HIDDEN}, from an accelerator that computes what it is asked for; {LEAKS}",
            crosses=True,
            integers=True,
        ),
        Policy(
            "verify",
            f"{_REST}; and it checks each product",
            "weights, and the activations of every product in the clear, as integers",
            f"{NO_CLAIM}; a wrong product passes with a probability below 2^-61",
            _ACTIVATIONS,
            crosses=True,
            integers=True,
        ),
        Policy(
            "masked+verify",
            f"{_REST}; and it checks each product",
            "weights, and integers that are uniform over the ring modulo 2^32",
            f"{_HIDDEN}; {LEAKS}; a wrong product passes with a probability below 2^-61",
            crosses=True,
            integers=True,
        ),
        Policy(
            "trusted", "everything, on the CPU", "nothing", f"weights, prompt, activations and output stay; {LEAKS}"
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Applied:
    """A policy over one model: the placement, the parameters where it wants them, and what it counts.

    `boundary`, `crossing`, the form in which it crosses, and `device`, to which, are `None` where nothing does.
    """

    policy: Policy
    placement: Placement
    params: Params
    ledger: Ledger
    boundary: Boundary | None = None
    crossing: str | None = None
    device: jax.Device | None = None

    def words(self) -> str:
        """What the policy lets the accelerator see, what it claims, and which device is taken for one."""
        said = f"policy {self.policy.name}: the accelerator sees {self.policy.seen}; {self.policy.claim}."
        if self.device is None:
            return said
        if self.device.platform == "cpu":
            return f"{said} A second device of this CPU plays it: from who owns this machine nothing is hidden."
        return f"{said} It is {self.device}."

    def report(self) -> str:
        """What has crossed so far, by site, and what was computed beforehand."""
        pads = {} if self.boundary is None else self.boundary.pads()
        return "\n".join([self.ledger.table(), *([pad_words(pads.values())] if pads else [])])

    def close(self) -> None:
        """Ends the session: secrets are overwritten, and nothing crosses any more."""
        if self.boundary is not None:
            self.boundary.close()


def find(name: str) -> Policy:
    """The policy of a name.

    Raises:
      PolicyError: there is none.
    """
    if name not in POLICIES:
        raise PolicyError(f"there is no policy {name!r}; known are {', '.join(POLICIES)}.")
    return POLICIES[name]


def apply(
    name: str,
    params: Params,
    *,
    implementation: str | None,
    activation_bits: int,
    way: str | None = None,
    crossing: str | None = None,
    sharded: bool = False,
) -> Applied:
    """Puts a policy over a model whose parameters are `params`; `crossing` is one of `CROSSINGS`, by default the first.

    `way` is that of Pallas, under `plain`; `sharded` is whether the parameters lie on a mesh.

    Raises:
      PolicyError: there is no such policy, or no device for it, or it has no such crossing, or none over a mesh.
    """
    policy = find(name)
    check_crossing(policy, crossing)
    check_mesh(policy, sharded)
    plain = (Sharded if sharded else Plain)(implementation, activation_bits, way=way)
    if not policy.crosses:
        if name == "trusted":
            here = trusted_cpu()
            return Applied(policy, replace(plain, platform=here.platform), jax.device_put(params, here), Ledger())
        return Applied(policy, plain, params, Ledger())
    trusted, device = devices(name)

    def link(product: Product) -> Link:
        if crossing in VIAS:
            return InProgram(device, product, via=crossing)
        return Driven(device, product)

    boundary: Boundary
    if not policy.integers:
        boundary = Split(link(clear_product(precise=activation_bits == 16, implementation=implementation)))
    else:
        boundary = IntegerBoundary(
            link(integer_product(implementation=implementation)), masked="masked" in name, verified="verify" in name
        )
    placement = Hosted(boundary, trusted)
    return Applied(
        policy, placement, placement.place(params), boundary.ledger, boundary, crossing or CROSSINGS[0], device
    )


def check_mesh(policy: Policy, sharded: bool) -> None:
    """Refuses a mesh under any policy but `plain`.

    Raises:
      PolicyError: it is so.
    """
    if sharded and policy.name != "plain":
        raise PolicyError(
            f"a mesh was asked for under the policy {policy.name!r}; only plain runs on several devices, so leave one "
            "of them away."
        )


def check_crossing(policy: Policy, crossing: str | None) -> None:
    """Refuses a form of the crossing that is not known, or any where nothing crosses.

    Raises:
      PolicyError: it is so.
    """
    if crossing is None:
        return
    if crossing not in CROSSINGS:
        raise PolicyError(f"there is no crossing {crossing!r}; known are {', '.join(CROSSINGS)}.")
    if not policy.crosses:
        crossed = ", ".join(known.name for known in POLICIES.values() if known.crosses)
        raise PolicyError(
            f"under the policy {policy.name!r} nothing crosses, and the crossing {crossing!r} was asked for; leave it "
            f"away, or choose a policy that crosses: {crossed}."
        )


def pad_words(reports: Iterable[PadReport]) -> str:
    """What the offline phase took, in a line."""
    made = list(reports)
    rows, seconds = sum(report.rows for report in made), sum(report.seconds for report in made)
    draw = sum(report.draw_seconds for report in made)
    waiting = sum(report.waiting_bytes for report in made)
    each = 1e3 * seconds / rows if rows else 0.0
    return (
        f"pads: {rows:,} rows made in {seconds:.2f} s beside the above ({each:.3f} ms each; {draw:.2f} s the cipher, "
        f"the rest r W), {waiting / 1e6:.1f} MB wait: they buy latency, not throughput"
    )


def trusted_cpu() -> jax.Device:
    """The CPU of this process.

    Raises:
      PolicyError: jax was told to leave it out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise PolicyError(
            "the trusted side runs on jax's CPU backend, which JAX_PLATFORMS leaves out; add cpu to it, behind the "
            "accelerator, as in JAX_PLATFORMS=cuda,cpu."
        ) from error


def devices(name: str) -> tuple[jax.Device, jax.Device]:
    """The trusted CPU, and the untrusted device: an accelerator, or a second device of this machine that plays one.

    Raises:
      PolicyError: there is neither.
    """
    trusted = trusted_cpu()
    untrusted = next((device for device in jax.devices() if device.platform != "cpu"), None)
    if untrusted is None:
        untrusted = next(iter(jax.devices("cpu")[1:]), None)
    if untrusted is None:
        raise PolicyError(
            f"the policy {name!r} needs a device beside the trusted CPU, and there is no accelerator; set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2 before jax is imported, and a second device of this "
            "CPU plays one."
        )
    return trusted, untrusted
