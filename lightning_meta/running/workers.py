"""Signals in the worker processes of a data loader."""

import os
import signal
import threading


def ignore_interrupts(worker: int) -> None:
    """Make a worker ignore Ctrl-C, so that the main process can finish its step; a ``worker_init_fn``.

    The worker also ignores SIGTERM, for example from a cluster's scheduler, unless the main process sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not have it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_main_process, daemon=True).start()


def _heed_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
