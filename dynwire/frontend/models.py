"""Which models there are: they come with the card of a worker, and go with the last worker that has it."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..client import AsyncClient
from ..config import Config
from ..errors import ConfigError, DynwireError
from ..kv_router.client import KvAsyncClient
from ..kv_router.router import KvRouter, KvRouterSettings
from ..kv_router.sync import check_replica_sync
from ..manager import AsyncNetworkManager
from ..migration import resume_tokens
from ..routing import make_chooser
from ..types import Instance
from ..workers.card import FileRef, ModelCard
from ..workers.protocol import EngineRequest
from ..workers.serve import fetch_file
from ..workers.template import ChatTemplate
from ..workers.tokenizer import Tokenizer
from .metrics import Metrics, ModelMetrics
from .problems import ApiError, model_not_found

logger = logging.getLogger("dynwire.frontend")

FIRST_RETRY_S = 0.5
LAST_RETRY_S = 10.0
"""between attempts to get the files of a model"""

Key = tuple[str, str]
"""name and checksum: workers whose cards say the same"""


def router_of(config: Config) -> str:
    """The name that clients know the configured router by. Raises `ConfigError` if it cannot do what is configured."""
    router = config.router.mode.replace("-", "_")
    make_chooser(router, random.Random())
    if config.router.replica_sync and router == "kv":
        check_replica_sync(config, config.router.kv_events)
    return router


def kv_settings_of(config: Config, card: ModelCard) -> KvRouterSettings:
    """What the kv router is told. Engine and router have to mean the same by a block, so the card decides unless overruled."""
    return KvRouterSettings.from_config(config, card.block_size)


class Model:
    """A model that can be asked: its files are loaded and its workers are followed. Loop thread only."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, template: ChatTemplate | None, metrics: ModelMetrics) -> None:
        self.card = card
        self.name = card.name
        self.tokenizer = tokenizer
        self.template = template
        self.metrics = metrics
        self.created = int(time.time())
        self.instances: tuple[Instance, ...] = ()
        self.sequences: int | None = None
        """that all workers together can run at once; None if one of them does not say"""
        self.total_blocks: dict[int, int] = {}
        """of the cache of each worker, per rank; without those that do not say"""
        self._clients: dict[str, AsyncClient] = {}

    @property
    def routers(self) -> dict[str, KvRouter]:
        """The kv routers of the model's endpoints; empty in the other modes."""
        return {path: client.kv for path, client in self._clients.items() if isinstance(client, KvAsyncClient)}

    def client(self) -> AsyncClient:
        """The client for the next request; several if workers are at several endpoints. Raises `ApiError` without any."""
        clients = self._clients
        if len(clients) == 1:
            return next(iter(clients.values()))
        if not clients:
            raise ApiError(503, f"the last worker of the model {self.name!r} has just left", code="no_worker", retry_after=1.0)
        # in proportion to their workers
        path = random.choice(self.instances).path if self.instances else ""
        return clients.get(path) or next(iter(clients.values()))


class _Loading:
    """A model that was announced and whose files are not here yet."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.problem = ""


class Registry:
    """All models, as discovery and the workers say. Belongs to the loop that started it."""

    def __init__(self, manager: AsyncNetworkManager, metrics: Metrics) -> None:
        self._manager = manager
        self._config = manager.config
        self._metrics = metrics
        self._router = router_of(manager.config)
        self._models: dict[str, Model] = {}
        self._loading: dict[Key, _Loading] = {}
        self._instances: dict[Key, tuple[Instance, ...]] = {}
        self._cards: dict[int, tuple[Any, ModelCard | None]] = {}
        self._complained: set[int] = set()
        self._watch: Any = None
        self._closed = False
        self._working = asyncio.Lock()
        self.changed: Callable[[], None] = lambda: None

    @property
    def models(self) -> tuple[Model, ...]:
        """Those that can be asked, by name."""
        return tuple(self._models[name] for name in sorted(self._models))

    def find(self, name: str) -> Model:
        """Raises `ApiError`: 404 if nobody serves it, 503 if its files cannot be had."""
        model = self._models.get(name)
        if model is not None:
            return model
        for (loading, _), state in self._loading.items():
            if loading == name:
                why = f": {state.problem}" if state.problem else ""
                raise ApiError(503, f"the model {name!r} is being loaded{why}", code="model_loading", retry_after=1.0)
        raise model_not_found(name, sorted(self._models))

    async def start(self) -> None:
        """Follow discovery from now on. Raises what discovery raises."""
        self._watch = await self._manager.watch_instances(self._update)

    async def close(self) -> None:
        """Follow nothing any more. Requests in flight go on."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        tasks = [state.task for state in self._loading.values()]
        self._loading.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for model in self._models.values():
            for client in model._clients.values():
                await client.close()

    def _card_of(self, instance: Instance) -> ModelCard | None:
        known = self._cards.get(instance.id)
        if known is not None and known[0] == instance.metadata:
            return known[1]
        try:
            card = ModelCard.from_metadata(instance.metadata)
        except ConfigError as error:
            card = None
            if instance.id not in self._complained:
                self._complained.add(instance.id)
                logger.warning(
                    "the worker %016x of %s at %s is left out: %s", instance.id, instance.path, instance.address, error
                )
        self._cards[instance.id] = (instance.metadata, card)
        return card

    def _update(self, instances: tuple[Instance, ...]) -> None:
        if self._closed:
            return
        namespace = self._config.frontend.namespace
        found: dict[Key, list[Instance]] = {}
        for instance in instances:
            if namespace is not None and instance.namespace != namespace:
                continue
            card = self._card_of(instance)
            if card is not None:
                found.setdefault((card.name, card.checksum), []).append(instance)
        known = {instance.id for instance in instances}
        self._cards = {i: entry for i, entry in self._cards.items() if i in known}
        self._complained &= known
        self._instances = {key: tuple(group) for key, group in found.items()}

        for name, model in list(self._models.items()):
            key = (name, model.card.checksum)
            if key in self._instances:
                self._follow(model, self._instances[key])
            else:
                del self._models[name]
                self._follow(model, ())
                logger.info("the model %s is gone with its last worker", name)
        for key, state in list(self._loading.items()):
            if key not in self._instances:
                state.task.cancel()
                del self._loading[key]
        for (name, checksum), group in self._instances.items():
            served = self._models.get(name)
            if served is None:
                if not any(loading == name for loading, _ in self._loading):
                    task = asyncio.get_running_loop().create_task(self._load((name, checksum)), name=f"load model {name}")
                    self._loading[name, checksum] = _Loading(task)
            elif served.card.checksum != checksum:
                self._complain_about_others(name, group)
        self.changed()

    def _complain_about_others(self, name: str, group: Sequence[Instance]) -> None:
        for instance in group:
            if instance.id not in self._complained:
                self._complained.add(instance.id)
                logger.error(
                    "the worker %016x of %s at %s is left out: it serves %s with another tokenizer, template, context length or "
                    "block size than the workers that were here first",
                    instance.id, instance.path, instance.address, name,
                )  # fmt: skip

    def _follow(self, model: Model, instances: tuple[Instance, ...]) -> None:
        """Set the workers of a model. Clients follow their own endpoint by themselves; here they are opened and closed."""
        model.instances = instances
        cards = {i.id: card for i in instances if (card := self._card_of(i)) is not None}
        model.total_blocks = {i: blocks for i, card in cards.items() if (blocks := card.limits.total_blocks) is not None}
        sequences = [card.limits.max_sequences for card in cards.values()]
        model.sequences = sum(s for s in sequences if s is not None) if sequences and None not in sequences else None
        paths = {instance.path for instance in instances}
        if paths != set(model._clients):
            task = asyncio.get_running_loop().create_task(self._set_clients(model), name=f"clients of {model.name}")
            task.add_done_callback(_report)

    async def _set_clients(self, model: Model) -> None:
        async with self._working:  # one at a time, in order: the last one sees the last state
            paths = {instance.path for instance in model.instances}
            for path in paths - set(model._clients):
                if not self._closed:
                    model._clients[path] = await self._client(model, path)
            for path in set(model._clients) - paths:
                await model._clients.pop(path).close()

    async def _client(self, model: Model, path: str) -> AsyncClient:
        key = (model.name, model.card.checksum)

        def accepts(instance: Instance) -> bool:
            card = self._card_of(instance)
            return card is not None and (card.name, card.checksum) == key

        limit = self._config.frontend.migration_limit
        resume: Any = None
        if limit:

            def resume(payload: EngineRequest, delivered: list[Any]) -> EngineRequest | None:
                continued = continue_request(payload, delivered)
                if continued is not None:
                    model.metrics.migrations += 1
                return continued

        return await self._manager.endpoint(path).client(
            router=self._router,
            migration_limit=limit,
            resume=resume,
            kv_settings=kv_settings_of(self._config, model.card) if self._router == "kv" else None,
            accepts=accepts,
        )

    async def _load(self, key: Key) -> None:
        pause = FIRST_RETRY_S
        while True:
            instances = self._instances.get(key)
            if not instances:
                return
            try:
                await self._load_from(key, instances[0])
                return
            except DynwireError as error:
                state = self._loading.get(key)
                if state is not None:
                    state.problem = str(error)
                logger.warning("the model %s cannot be loaded, trying again in %g s: %s", key[0], pause, error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)

    async def _load_from(self, key: Key, instance: Instance) -> None:
        card = self._card_of(instance)
        assert card is not None  # that is what its group is made by
        source = await self._file(card, card.tokenizer, instance)
        template_source = None if card.chat_template is None else await self._file(card, card.chat_template, instance)
        tokenizer, template = await asyncio.to_thread(_build, card, source, template_source)
        model = Model(card, tokenizer, template, self._metrics.of(card.name))
        instances = self._instances.get(key, ())
        model.instances = instances
        await self._set_clients(model)
        instances = self._instances.get(key, ())
        if self._closed or not instances:
            model.instances = ()
            await self._set_clients(model)
            return
        self._loading.pop(key, None)
        self._models[card.name] = model
        self._follow(model, instances)
        logger.info("the model %s is served, %d worker(s)", card.name, len(instances))
        self.changed()

    async def _file(self, card: ModelCard, ref: FileRef, instance: Instance) -> bytes:
        data = await asyncio.to_thread(ref.read)
        if data is not None:
            return data
        if card.files_endpoint is None:
            raise ConfigError(
                f"{ref.name} of {card.name} is not at {ref.path} of this machine, and its worker does not offer its files",
                name="files_endpoint",
            )
        client = await self._manager.endpoint(card.files_endpoint).client(router="direct")
        try:
            return await fetch_file(client, ref, instance.metadata.get("files_instance"))
        finally:
            await client.close()


def _build(card: ModelCard, source: bytes, template: bytes | None) -> tuple[Tokenizer, ChatTemplate | None]:
    tokenizer = Tokenizer(source, card.bos_token_id if card.add_bos_token else None)
    if template is None:
        return tokenizer, None
    return tokenizer, ChatTemplate(template.decode("utf-8", "replace"), card.special_tokens)


def continue_request(request: EngineRequest, delivered: list[Any]) -> EngineRequest | None:
    """The request for the rest of an answer whose worker was lost: prompt and tokens so far, and that many fewer to make.

    None if nothing is missing. Raises `ValueError` if an item is none of an answer.
    """
    continued = resume_tokens(msgspec.to_builtins(request), delivered)
    return None if continued is None else msgspec.convert(continued, EngineRequest)


def _report(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.error("%s failed: %s", task.get_name(), error, exc_info=error)
