"""A bundle that runs: onnxruntime loops the step."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, read_bundle
from ..errors import BackendError, InputError, StateError
from ..tokenizer import open_tokenizer
from . import coreml
from .sampling import Sampling, Settings, changed
from .state import N_RECENT, State, load_state
from .tables import Tables

if TYPE_CHECKING:
    from .generate import Generation, Logits

# KL, in nats per token, of a graph with 8-bit activations against exact arithmetic on the same weights: what eval and
# check warn above. Measured 7e-5 to 2.3e-4 on three trained models (7M, 8M, 60M), int8 and int4, blocks of 16 to 128: it
# hardly depends on model and width. Where a few inputs of a block dwarf the others, it is a thousand times as much.
ARITHMETIC_KL = 1e-3


def arithmetic_warning(name: str | Path, kl: float) -> tuple[str, ...]:
    """Say that a bundle's 8-bit activations cost too much, if they do."""
    if kl <= ARITHMETIC_KL:
        return ()
    return (
        f"{name}: 8-bit activations cost a KL of {kl:.2g} nats per token (limit {ARITHMETIC_KL:g}): "
        "run with --exact, or export with --arithmetic exact",
    )


Array = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


def open_bundle(
    path: str | Path,
    *,
    threads: int | None = None,
    spin: bool = True,
    verify: bool = True,
    exact: bool = False,
    interpret: str | None = None,
) -> "Model":
    """Open a bundle to run it.

    threads  for onnxruntime's matrix products; None takes every core
    spin     let idle threads wait busily between products: faster, but it takes time from other programs
    verify   compare every file's sha256 with the manifest (1.7 GB a second); leave out for your own installation
    exact    compute matrix products in float32, where the bundle else rounds activations to 8 bits; decoding is slower,
             with 8-bit weights ten times

    interpret  of a Core ML bundle: compute its packages in numpy, slowly, anywhere; "native" rounds to float16 as they
               say, "flushed" also takes its subnormal numbers for 0, "exact" computes in float64. None: Core ML itself,
               on macOS

    Raises  BundleError if the bundle is damaged, BackendError if onnxruntime or Core ML cannot run it.
    """
    return Model(read_bundle(path, verify=verify), threads=threads, spin=spin, exact=exact, interpret=interpret)


class Model:
    """A bundle's graph in an onnxruntime session, or in Core ML.  States may be shared between threads, and so may a model.

    bundle         manifest, spec and tensors
    tokenizer      of the bundle; None where it has none
    eos_token_ids  ids of the tokens that end a text; none without a tokenizer
    bos_token_id   id of the token that stands before a text's first one; 0 without a tokenizer
    tokenizer_sha256  of the tokenizer's file, to which a state's last ids belong; None without a tokenizer
    sampling       the bundle's defaults
    first          the state that every text begins from, where the bundle has one; None is zeros
    interpreted    whether numpy computes it, in place of Core ML
    arithmetic     of its matrix products: "exact", "int8 activations", or Core ML's "float16"
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        spin: bool = True,
        exact: bool = False,
        interpret: str | None = None,
    ) -> None:
        self.bundle = bundle
        self.spec = bundle.spec
        self.interpreted = interpret is not None
        about = bundle.manifest["tokenizer"]
        self.tokenizer = open_tokenizer(bundle.path / about["file"]) if about else None
        self.tokenizer_sha256: str | None = bundle.manifest["files"][about["file"]]["sha256"] if about else None
        self.eos_token_ids: tuple[int, ...] = tuple(about["eos_token_ids"]) if about else ()
        self.bos_token_id: int = about["bos_token_id"] if about else 0
        self.sampling = Sampling(**bundle.manifest["sampling"])
        first = bundle.manifest["initial_state"]
        self.first: State | None = self.load_state(bundle.path / first) if first else None
        self._lock = threading.Lock()
        self._parts: dict[str, list[coreml.Part]] | None = None
        if bundle.target == "coreml":
            if threads is not None:
                raise InputError(f"{bundle.path} is a Core ML bundle, which takes no number of threads: that is onnxruntime's")
            if exact:
                raise InputError(
                    f"{bundle.path} is a Core ML bundle, which computes in float16: exact is onnxruntime's; "
                    'interpret="exact" (--interpret --exact) computes it in float64'
                )
            self._parts = coreml.open_parts(bundle, interpret)
            self.arithmetic = "exact" if interpret == "exact" else "float16"
        elif interpret is not None:
            raise InputError(f"{bundle.path} is no Core ML bundle: onnxruntime runs it, and nothing is interpreted")
        else:
            self._graph = bundle.exact_graph() if exact else bundle.graph("run")
            self.arithmetic = str(self._graph["arithmetic"])
            self._session = _session(bundle.path / self._graph["file"], self._graph["needs"], threads, spin)
        self._loop = self.loop()

    def __repr__(self) -> str:
        return f"Model({str(self.bundle.path)!r}, RWKV-{self.spec.version}, {self.spec.n_parameters:,} parameters)"

    def loop(self) -> "Loop | coreml.Loop":
        """State buffers of their own, and the step that loops over them."""
        return coreml.Loop(self, self._parts) if self._parts else Loop(self)

    def check_state(self, state: State | None) -> State | None:
        """Give a state to begin from: the model's first one if there is none.

        Raises  InputError, StateError if it is no state of this model.
        """
        state = self.first if state is None else state
        if state is not None and not isinstance(state, State):
            raise InputError(f"the state is a {type(state).__name__}: give the State that feed, generate or load_state gave")
        if state is not None and state.model_id != self.bundle.model_id:
            raise StateError(
                f"the state belongs to another model ({state.model_id[:12]}), not to this one ({self.bundle.model_id[:12]})"
            )
        shapes = {name: t.shape for name, t in self.spec.state_tensors.items()}
        if state is not None and {n: x.shape for n, x in state.tensors.items()} != shapes:
            raise StateError("the state's tensors are not those of this model")
        return state

    def feed(self, tokens: Sequence[int] | Tokens, state: State | None = None, *, every: bool = False) -> tuple[Array, State]:
        """Read tokens on top of a state, or from the start.

        Returns  the logits after the last token, float32 (V,), or after `every` one, (T, V); and the new state. Both
                 are fresh; the state that went in is unchanged.
        Raises   InputError if there are no tokens or one is out of range; StateError for another model's state.
        """
        ids = self.check_tokens(tokens)
        with self._lock:
            self._loop.load(state)
            logits = self._loop.read(ids, every=every)
            return logits.copy() if every else logits[-1].copy(), self._loop.state()

    def generate(
        self,
        prompt: str | Sequence[int],
        state: State | None = None,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logits: "Logits | None" = None,
        top_logprobs: int = 0,
        sampling: Sampling | None = None,
        **settings: Unpack[Settings],
    ) -> "Generation":
        """Read a prompt and continue it, token by token, as the result is iterated over.

        prompt        text or token ids. An empty one goes on from a state that has logits, as every one that feed or generate
                      gave; where nothing was read before, it is the token that begins a text
        max_tokens    None: until the end of text
        stop          texts that end the generation and are not part of it
        logits        called before every choice with the logits (V,) and the ids given so far; returns the logits to choose
                      by, such as with -inf for what a grammar forbids
        top_logprobs  so many most likely tokens are given with each
        sampling      None takes the bundle's
        settings      temperature, top_p, seed ...: changes to it, see Sampling

        Raises  InputError for settings out of range, or an empty prompt on a state without logits; StateError for another
                model's state.
        """
        from .generate import Generation

        return Generation(
            self,
            self.prompt_ids(prompt, state),
            state,
            max_tokens=max_tokens,
            stop=stop,
            sampling=changed(self.sampling if sampling is None else sampling, settings),
            logits=logits,
            n_top=top_logprobs,
        )

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Give the token ids of a text.

        special_tokens  False: the text of a special token is text as any other, such as <|im_end|> in a message

        Raises  InputError if the bundle has no tokenizer, or it cannot encode the text.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer: give token ids (run --ids), or export with --tokenizer")
        return self.tokenizer.encode(text, special_tokens=special_tokens)

    def token(self, text: str) -> int:
        """Give the id of a text that is one token.

        Raises  InputError if it is none, or several.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens {ids}, and not one: give ids")
        return ids[0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one step reads: all but those of which it reads a row."""
        kinds = {name: w.kind for name, w in self.spec.weights.items()}
        return sum(t.nbytes for name, t in self.bundle.tensors.items() if kinds[name] not in ("embedding", "table"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Give the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises  InputError if the bundle has no tokenizer, or an id is out of range.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer: export with --tokenizer")
        return self.tokenizer.decode(self.check_tokens(tokens).tolist()) if np.size(tokens) else ""

    def load_state(self, path: str | Path) -> State:
        """Read a state file of this model.

        Raises  StateError if it is missing, damaged, or of another model.
        """
        return load_state(path, model_id=self.bundle.model_id, spec=self.spec)

    def prompt_ids(self, prompt: str | Sequence[int], state: State | None = None) -> Tokens:
        """Give the ids that a generation reads first: of an empty prompt, the token that begins a text, or after a state none.

        Raises  InputError
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        if hasattr(ids, "__len__") and not len(ids):
            if state is None or (isinstance(state, State) and not state.n_tokens):
                ids = [self.bos_token_id]
            elif isinstance(state, State) and state.logits is not None:
                return np.empty(0, np.int64)
        return self.check_tokens(ids)

    def _recent(self, state: State | None) -> tuple[int, ...]:
        """Give the last ids of a state; none if they are another tokenizer's."""
        return state.recent if state is not None and state.tokenizer == self.tokenizer_sha256 else ()

    def _new_state(self, loop: "Loop | coreml.Loop", tensors: Mapping[str, Array], logits: Array | None) -> State:
        """Give the state of a loop: its tensors, and what it knows of the text."""
        of = self.tokenizer_sha256 if loop.recent else None
        return State(self.bundle.model_id, loop.n_tokens, tensors, logits, loop.recent, of, loop.occurrences)

    def _later(self, recent: tuple[int, ...], ids: list[int]) -> tuple[int, ...]:
        """Give the last ids after some more; none without a tokenizer, whose ids they would be."""
        return (*recent, *ids[-N_RECENT:])[-N_RECENT:] if self.tokenizer_sha256 else ()

    def check_tokens(self, tokens: Sequence[int] | Tokens) -> Tokens:
        """Give tokens as an array; onnxruntime itself would take ids out of range in silence."""
        if isinstance(tokens, str):
            raise InputError("this is text, and token ids are expected: model.encode gives them")
        try:
            ids = np.asarray(tokens)
        except ValueError as e:
            raise InputError("tokens are not a flat list of whole numbers") from e
        if ids.size == 0:
            raise InputError("there are no tokens to read: give at least one, or a state to go on from")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"tokens are not a flat list of whole numbers, but {ids.dtype} of shape {ids.shape}")
        outside = ids[(ids < 0) | (ids >= self.spec.n_vocab)]
        if len(outside):
            raise InputError(f"token {int(outside[0])} is outside the vocabulary of 0 to {self.spec.n_vocab - 1}")
        return ids.astype(np.int64)


class Loop:
    """Two private sets of state buffers that the step swaps, and the bindings of both directions.

    n_tokens     that the current state has read
    recent       ids of the last of them, as a state keeps them
    occurrences  those of the state that was loaded
    logits       (V,) after the last of them, valid until the next call
    """

    def __init__(self, model: Model) -> None:
        import onnxruntime as ort

        self._ort, self._model, self._spec = ort, model, model.spec
        graph = model._graph
        self._chunk: int = graph["T"]
        self._key_first = {
            i["name"].removeprefix("state."): i["layout"] == "key,value" for i in graph["inputs"] if "layout" in i
        }
        shapes = {i["name"]: tuple(i["shape"]) for i in graph["inputs"] if i["name"].startswith("state.")}
        self._sets = [{name: np.empty(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
        self._bindings = []
        for a, b in ((0, 1), (1, 0)):
            binding = model._session.io_binding()
            for name in shapes:
                binding.bind_ortvalue_input(name, self._value(self._sets[a][name]))
                binding.bind_ortvalue_output(f"{name}.out", self._value(self._sets[b][name]))
            self._bindings.append(binding)
        self._at = 0
        self._tables = Tables.of(model.bundle) if model.spec.tables else None
        # decoding: bound once, used for every token
        self._one = np.zeros(1, np.int64), np.zeros(1, np.int64), np.empty((1, self._spec.n_vocab), np.float32)
        self._one_rows = np.empty((1, *self._tables.shape), np.float32) if self._tables else None
        self._one_bound = [False, False]
        self.logits: Array = self._one[2][0]
        self.load(None)

    def _value(self, x: npt.NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(x)  # shares x's memory

    def load(self, state: State | None) -> None:
        """Begin from a state, or from the model's first one."""
        state = self._model.check_state(state)
        if state is not None and state.logits is not None:
            self.logits = state.logits.copy()
        self.n_tokens = 0 if state is None else state.n_tokens
        self.recent = self._model._recent(state)
        self.occurrences = None if state is None else state.occurrences
        for name, t in self._spec.state_tensors.items():
            buffer = self._buffer(name)
            buffer[...] = t.first if state is None else state.tensors[name]

    def state(self) -> State:
        """Copy the state out."""
        tensors = {name: self._buffer(name).copy(order="C") for name in self._spec.state_tensors}
        logits = self.logits.copy() if self.n_tokens else None
        return self._model._new_state(self, tensors, logits)

    def _buffer(self, name: str) -> Array:
        """The current buffer as the state's document has it: a view."""
        x: Array = self._sets[self._at][f"state.{name}"]
        if self._key_first.get(name):
            x = x.swapaxes(-1, -2)
        return x.reshape(self._spec.state_tensors[name].shape) if x.ndim != 4 else x[0]

    def read(self, ids: Tokens, *, every: bool = False, progress: Callable[[int, int], None] | None = None) -> Array:
        """Read tokens in chunks.

        progress  called with tokens read and tokens in all

        Returns  logits (T, V) of every token, or (1, V) of the last; valid until the next call
        """
        parts = []
        for i in range(0, len(ids), self._chunk):
            chunk = ids[i : i + self._chunk]
            logits = self._run(chunk, every)
            if every:
                parts.append(logits.copy())
            if progress:
                progress(i + len(chunk), len(ids))
        return np.concatenate(parts) if every else logits

    def step(self, token: int) -> Array:
        """Read one token: its logits (V,), valid until the next call. Allocates nothing."""
        tokens, _, logits = self._one
        tokens[0] = token
        binding = self._bindings[self._at]
        if not self._one_bound[self._at]:
            self._bind(binding, *self._one, self._one_rows)
            self._one_bound[self._at] = True
        if self._tables and self._one_rows is not None:
            self._one_rows[...] = self._tables.rows(tokens)
        self._go(binding, [token], logits)
        return self.logits

    def _run(self, ids: Tokens, every: bool) -> Array:
        n = len(ids)
        positions = np.arange(n) if every else np.array([n - 1])
        logits = np.empty((len(positions), self._spec.n_vocab), np.float32)
        rows = self._tables.rows(ids) if self._tables else None
        self._bind(self._bindings[self._at], np.ascontiguousarray(ids), positions, logits, rows)
        self._one_bound[self._at] = False
        self._go(self._bindings[self._at], ids.tolist(), logits)
        return logits

    def _bind(self, binding: Any, tokens: Tokens, positions: Tokens, logits: Array, rows: Array | None) -> None:
        binding.bind_ortvalue_input("tokens", self._value(tokens))
        binding.bind_ortvalue_input("positions", self._value(positions))
        if rows is not None:
            binding.bind_ortvalue_input("deep_embed", self._value(rows))
        binding.bind_ortvalue_output("logits", self._value(logits))

    def _go(self, binding: Any, ids: list[int], logits: Array) -> None:
        try:
            self._model._session.run_with_iobinding(binding)
        except Exception as e:  # onnxruntime's errors are of several unrelated classes
            raise BackendError(f"onnxruntime failed: {_first_line(e)}") from e
        # together: an interrupt comes before or after, and finds a whole state
        n_tokens, recent = self.n_tokens + len(ids), self._model._later(self.recent, ids)
        self._at, self.n_tokens, self.recent, self.logits = self._at ^ 1, n_tokens, recent, logits[-1]


MAX_THREADS = 256


def _session(file: Path, needs: Mapping[str, str], threads: int | None, spin: bool) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise BackendError(f"onnxruntime cannot be imported ({e}): pip install onnxruntime") from e
    if _version(ort.__version__) < _version(needs["onnxruntime"]):
        raise BackendError(f"the bundle needs onnxruntime {needs['onnxruntime']}, this is {ort.__version__}: update it")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise InputError(f"threads {threads!r} is not possible: expected 1 to {MAX_THREADS}")
    ort.disable_telemetry_events()  # nothing here speaks to anybody
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's errors are of several unrelated classes
        raise BackendError(f"onnxruntime {ort.__version__} cannot load {file}: {_first_line(e)}") from e


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("+")[0].split(".")[:3] if n.isdigit())


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
