"""Checkpoints that a kill can never leave half-written."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook

from las_mm.fileio import write_atomically
from las_mm.registry import HOOKS


class AtomicLocalBackend(LocalBackend):
    """mmengine's local file backend with all-or-nothing writes."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, bytes(obj))

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        write_atomically(filepath, obj.encode(encoding))


register_backend("las_mm_atomic", AtomicLocalBackend, force=True)


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` for local folders, safe against being killed at any time.

    What changes against the parent: a checkpoint appears under its name only when complete;
    ``last_checkpoint`` is replaced only after that; outdated checkpoints are removed last, so
    there is always a good one (the parent removes them before it writes). Training resumed with
    ``--resume`` therefore starts from the last complete checkpoint. Only ``save_best`` is the
    parent's: it removes the previous best checkpoint before it writes the new one.

    Args:
        args, kwargs: As for the parent; ``backend_args`` cannot be given.

    Examples:
        >>> default_hooks = dict(
        ...     checkpoint=dict(type='las_mm.AtomicCheckpointHook', interval=1, max_keep_ckpts=2))
    """

    def __init__(self, *args, **kwargs) -> None:
        if kwargs.get("backend_args") is not None or kwargs.get("file_client_args") is not None:
            raise ValueError(
                "AtomicCheckpointHook writes to local folders and takes no backend_args; use "
                "mmengine's CheckpointHook for a remote store"
            )
        super().__init__(*args, **kwargs)
        self.backend_args = dict(backend="las_mm_atomic")

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_atomically(Path(runner.work_dir) / "last_checkpoint", self.last_ckpt.encode())
            if outdated is not None:
                Path(self.out_dir, self.filename_tmpl.format(outdated)).unlink(missing_ok=True)
