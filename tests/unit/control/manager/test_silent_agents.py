from pals_ray.control.manager.silent_agents import HANGS_S, hangs


def test_an_agent_that_was_silent_for_too_long_hangs():
    assert not hangs(100.0 + HANGS_S - 1, 100.0, None)
    assert hangs(100.0 + HANGS_S, 100.0, None)


def test_after_a_cut_of_30_s_an_agent_has_30_s_more_for_its_first_word():
    healed_s = 130.0
    assert not hangs(healed_s + 30.0 + HANGS_S - 1, 100.0, healed_s)
    assert hangs(healed_s + 30.0 + HANGS_S, 100.0, healed_s)


def test_a_cut_before_an_agents_last_word_gives_it_no_time():
    assert hangs(100.0 + HANGS_S, 100.0, 50.0)
