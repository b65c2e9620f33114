"""Processes of a data loader, and the signals that they ignore."""

import os
import signal
import threading


def ignore_interrupts(worker: int) -> None:
    """A ``worker_init_fn``: when all processes get a signal, the main one still ends its step, with their help.

    They ignore Ctrl-C, and SIGTERM (of a cluster's scheduler, say) unless the main process sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_main_process, daemon=True).start()


def _heed_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
