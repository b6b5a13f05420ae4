from retina.data.workers import lock_free_fork


def test_a_flag_is_seen_by_forked_processes_both_ways() -> None:
    context = lock_free_fork()
    seen, answer = context.Event(), context.Event()
    assert not seen.is_set()

    def look() -> None:
        while not seen.is_set():
            pass
        answer.set()

    process = context.Process(target=look)
    process.start()
    seen.set()
    process.join(timeout=1000)
    assert process.exitcode == 0
    assert answer.is_set()
