"""A run: one harvest of one model over one prompt set, as users hold it."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from actdb.errors import DamageError, SelectionError, SettingError, WriteError
from actdb.schema import FileRecord, RunInfo, SiteSpec
from actdb.selection.prompts import PromptIndex, read_prompt_index
from actdb.selection.reader import SiteReader
from actdb.selection.streams import Block
from actdb.selection.view import Selection, Source, site_error
from actdb.storage.commits import RunSnapshot
from actdb.storage.folder import Folder

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    import xarray
    from transformer_lens import ActivationCache

    from actdb.unembedding import Readout

WEIGHT_GROUPS = ("", "embed.", "pos_embed.", "unembed.", "ln_final.")
LAYER_GROUPS = ("", "attn.", "mlp.")
ORDERS = ("id", "stored")
TIED = {"unembed.W_U": "embed.W_E"}


class Run:
    """Read access to one run; `run["z"]` is a lazy selection of all stored values of a site."""

    def __init__(
        self,
        folder: Folder,
        snapshot: RunSnapshot,
        matching: Callable[[str, str], Sequence[int]],
        renew: Callable[[], RunSnapshot] | None = None,
    ) -> None:
        self._folder = folder
        self._snapshot = snapshot
        self._matching = matching
        self._renew = renew  # None where the database is open for reading
        self._readers: dict[str, SiteReader] = {}

    @property
    def name(self) -> str:
        """The run's name, its key in every table."""
        return self.info.name

    @property
    def info(self) -> RunInfo:
        """What was planned and under which configuration."""
        return self._snapshot.info

    @property
    def snapshot(self) -> RunSnapshot:
        """The run and its committed parts, as seen when the database was opened or refreshed."""
        return self._snapshot

    @property
    def prompt_index(self) -> PromptIndex:
        """Where each prompt is stored: arrays by prompt_id."""
        return self._prompts

    @property
    def step(self) -> int | None:
        """The training step that was given to the harvest."""
        step = self.info.plan.get("step")
        return None if step is None else int(step)

    @property
    def status(self) -> str:
        """`complete`, or `partial` while parts are missing."""
        return "complete" if self._snapshot.complete else "partial"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the stored sites."""
        return tuple(spec.name for spec in self.info.sites)

    @property
    def n_prompts(self) -> int:
        """Prompts of the prompt set, stored or not."""
        return self.info.n_prompts

    @property
    def layers(self) -> tuple[int, ...]:
        """The harvested layers, by the model's numbers."""
        return tuple(sorted({layer for spec in self.info.sites for layer in spec.layers}))

    def __getitem__(self, site: str) -> Selection:
        """Return everything stored of a site; raises `SiteError` with the sites that there are. Reads nothing."""
        return Selection(self.source(site))

    def source(self, site: str) -> Source:
        """Return what selections of a site read from; raises `SiteError`. Reads nothing."""
        reader = self._readers.get(site)
        if reader is None:
            reader = self._readers.setdefault(site, SiteReader(self._folder, self.info, self._spec(site)))
        return Source(reader, self._prompt_index, self._prompts_where, self.info.causal)

    def __contains__(self, site: object) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def tokens(self, prompt: int) -> npt.NDArray[np.int32]:
        """Return a prompt's token ids [pos], as the model saw them."""
        self._prompts.check(prompt)
        begin, end = self._token_starts[prompt : prompt + 2]
        return np.asarray(self._tokens["token_id"][begin:end], np.int32)

    def token_texts(self, prompt: int) -> list[str]:
        """Return the text of each token of a prompt."""
        self._prompts.check(prompt)
        begin, end = self._token_starts[prompt : prompt + 2]
        return [str(text) for text in self._tokens["token"][begin:end]]

    def prompt_ids(self, where: str | None = None, *, order: str = "id") -> list[int]:
        """Return the ids of the stored prompts: of all, or of those for which an SQL condition holds.

        `where` is an expression over label columns and `run_prompts`, as for `sel`; raises `SqlError` for any other.
        They ascend, or with `order="stored"` come in the order in which they are stored: groups of prompts taken in
        this order read each chunk once, and it is the order that `add_site` wants.
        """
        if order not in ORDERS:
            raise SettingError(f"order {order!r}: choose one of {', '.join(ORDERS)}")
        stored = self._prompts.stored
        found = [i for i in (range(len(stored)) if where is None else self._prompts_where(where)) if stored[i]]
        return found if order == "id" else self._prompts.in_storage_order(np.asarray(found, np.int64)).tolist()

    def add_site(self, name: str, *, dims: Sequence[str], blocks: Iterable[Block], replace: bool = False) -> None:
        """Store a site of your own beside the harvested ones, such as what an analysis computed for every prompt.

        Afterwards `run[name]`, SQL, `verify` and `rm` know it as any site; any Zarr reader opens it. `dims` name the
        axes of a block's values: one of "prompt" and "row", before it none, "layer" (as many as `run.layers`), a head
        axis or both, after it none or one of your own. `blocks` are `actdb.Block`s of any size: values, each row's
        prompt and for rows its pos, all prompts in the order of `prompt_ids(order="stored")`, which is that of
        `batches`. Their dtype is kept (float16 to 64, uint16, uint32, int64). They are taken one by one: a generator
        needs memory for one block, and some 128 MiB on the way to disk.

        The site appears when all is written. What a killed call left is replaced by the next one, a whole site only
        with `replace`. Needs `mode="a"` and a complete run. Raises `SettingError` for a name that is taken and for
        blocks that do not fit, `OverflowingError` for values that are not finite, `RunError` while the run is partial.
        """
        if self._renew is None:
            raise WriteError(f"{self._folder.root} is open for reading; open it with mode='a' to add sites")
        from actdb.harvesting.addition import add_site

        self._snapshot = self._renew()
        add_site(self._folder, self._snapshot, self._prompts, name, dims, blocks, replace_whole=replace)
        self._snapshot = self._renew()
        self._readers.pop(name, None)

    def vocabulary(self) -> dict[int, str]:
        """Return the text of each token id that the run's prompts hold. Costs one scan of its tokens."""
        texts = self._token_table().group_by("token_id").aggregate([("token", "min")]).drop_null()
        return dict(zip(texts.column("token_id").to_pylist(), texts.column("token_min").to_pylist(), strict=True))

    def weight(self, name: str, *, layer: int | None = None, head: int | None = None) -> npt.NDArray[Any]:
        """Return a stored weight under its TransformerLens name, such as `W_E`, `W_U`, or `W_O` of a layer and head.

        Shapes: W_E [d_vocab, d_model], W_U [d_model, d_vocab], W_Q, W_K, W_V [head, d_model, d_head] (W_K, W_V by kv
        head), W_O [head, d_head, d_model]. Norms are `ln1.w`, `ln_final.w` and so on. A copy in memory. Raises
        `SelectionError` listing what there is.
        """
        file = "rest" if layer is None else f"layer-{layer:03d}"
        record = next((r for r in self.info.files if r.path.endswith(f"/{file}.safetensors")), None)
        if record is None:
            raise SelectionError(f"no weights are stored for layer {layer}; run {self.name!r} has {self.layers}")
        groups = WEIGHT_GROUPS if layer is None else tuple(f"blocks.{layer}.{group}" for group in LAYER_GROUPS)
        value = self._read_weight(record, name, groups)
        if head is None:
            return value
        if layer is None or value.ndim < 2 or not 0 <= head < len(value):
            raise SelectionError(f"head {head}: weight {name!r} has heads 0 to {len(value) - 1}")
        return np.asarray(value[head])

    def weight_names(self, *, layer: int | None = None) -> tuple[str, ...]:
        """Return the names of the stored weights of a layer, or of those outside the layers."""
        file = "rest" if layer is None else f"layer-{layer:03d}"
        records = [r for r in self.info.files if r.path.endswith(f"/{file}.safetensors")]
        names = {key for record in records for key in _header(self._folder, record) if key != "__metadata__"}
        return tuple(sorted(names))

    def torch_weight(self, name: str, *, layer: int | None = None, head: int | None = None) -> "torch.Tensor":
        """Return a stored weight as a CPU tensor; see `weight`."""
        import torch

        return torch.from_numpy(np.array(self.weight(name, layer=layer, head=head)))

    def readout(self) -> "Readout":
        """Return the final norm and unembedding of the run's weights, which make logits of residual vectors.

        `.norm.normalised(rows)` and `.logits(rows)` take [row, d_model] in float32; of the last layer's `resid_post`
        the latter are the model's own logits, to the stored precision. Holds W_U in memory. Raises `SelectionError`
        where the run keeps no unembedding, and for models that look both ways.
        """
        from actdb.unembedding import Readout

        return Readout.of_run(self)

    def dataset(self) -> "xarray.Dataset":
        """Return the run as a lazy xarray Dataset, a variable a site; reads nothing but the prompt table.

        Variables keep the stored dtype and axes: [layer, head, row, feature] with the rows of the stored prompts in
        prompt order, as `run[site].numpy()`, patterns packed [layer, head, entry], prompt-level sites [prompt_id,
        feature]. An axis on which sites differ gets the site's name before it (`<site>_layer`). Coordinates: `layer`
        (the model's numbers), `head`, `kv_head`; `prompt` and `pos` of each row; `entry_prompt`, `query` and `key` of
        each entry; `n_tokens` and `label_<name>` of each `prompt_id`, null where it has none. Indexing reads the chunks
        that hold the values and keeps nothing; `.load()` keeps. Raises `SettingError` where xarray is not installed.
        """
        from actdb.interchange.dataset import open_dataset

        return open_dataset(self)

    def activation_cache(
        self, prompt: SupportsIndex | Sequence[int], *, model: Any = None, dtype: str | None = None
    ) -> "ActivationCache":
        """Return one prompt, or several of one length, as a TransformerLens `ActivationCache` that reads when asked.

        Keys are hook names, tensors [batch, pos, …] as `run_with_cache` gives them, in the dtype that the model
        computed in (or `dtype`), with the stored precision. A missing activation is a `KeyError` that lists the stored
        sites. Methods that need weights (`stack_head_results`, `logit_attrs`) take those stored with the run, or
        `model`, which any method that runs the model needs. Raises `SelectionError` for prompts of several lengths.
        """
        from actdb.interchange.cache import open_cache

        return open_cache(self, prompt, model=model, dtype=dtype)

    def __repr__(self) -> str:
        return f"<Run {self.name!r} {self.status}, {self.n_prompts} prompts, sites {', '.join(self.sites) or 'none'}>"

    @cached_property
    def _prompts(self) -> PromptIndex:
        return read_prompt_index(self._folder, self.info, self._snapshot.parts)

    def _prompt_index(self) -> PromptIndex:
        return self._prompts

    def _prompts_where(self, where: str) -> Sequence[int]:
        return self._matching(self.name, where)

    @cached_property
    def _tokens(self) -> Mapping[str, Any]:
        table = self._token_table()
        return {"token_id": table.column("token_id").to_numpy(), "token": table.column("token").to_pylist()}

    def _token_table(self) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = f"runs/{self.name}/tokens.parquet"
        path = self._folder.inside(name)
        try:
            return pq.read_table(path, columns=["token_id", "token"])
        except (FileNotFoundError, pa.ArrowException, OSError) as exc:
            raise DamageError(f"{self._folder.path(name)} is missing or damaged; run the same harvest again") from exc

    @cached_property
    def _token_starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._prompts.n_tokens)])

    def _spec(self, site: str) -> SiteSpec:
        spec = self.info.site(site)
        if spec is None:
            raise site_error(self.name, site, self.sites)
        return spec

    def _read_weight(self, record: FileRecord, name: str, groups: Sequence[str]) -> npt.NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        header = _header(self._folder, record)
        candidates = [f"{group}{name}" for group in groups]
        found = next((key for key in candidates if key in header), None)
        transpose = False
        if found is None and "tied" in header.get("__metadata__", {}):
            found = next((TIED[key] for key in candidates if key in TIED), None)
            transpose = found is not None
        if found is None:
            names = ", ".join(key for key in sorted(header) if key != "__metadata__")
            raise SelectionError(f"run {self.name!r} has no weight {name!r} there; it has {names}")
        path = self._folder.inside(record.path)
        try:
            with safe_open(path, framework="numpy") as file:
                value = file.get_tensor(found)
        except (OSError, SafetensorError) as exc:
            raise DamageError(f"{self._folder.path(record.path)} is damaged; run the same harvest again") from exc
        return np.asarray(value.T if transpose else value)


def _header(folder: Folder, record: FileRecord) -> dict[str, Any]:
    """Read the JSON header of a safetensors file."""
    path = folder.inside(record.path)
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > record.stored_bytes:
                raise ValueError("header longer than the file")
            return dict(json.loads(file.read(size)))
    except (OSError, ValueError) as exc:
        raise DamageError(f"{folder.path(record.path)} is missing or damaged; run the same harvest again") from exc
