import numpy as np

from data.groups import GroupMap, GroupSet


def test_replaced_groups_and_all_others():
    groups = GroupMap({5: 7, -3: 7})
    assert [groups[group] for group in (5, -3, 7, 99)] == [7, 7, 7, 99]
    assert groups.apply(np.array([99, 5, -3, 6, 7])).tolist() == [99, 7, 7, 6, 7]
    assert GroupMap().apply(np.array([1, 2])).tolist() == [1, 2]


def test_a_set_of_groups():
    some = GroupSet([9, -4, 9])
    assert len(some) == 2
    assert some.holds(np.array([-5, -4, 8, 9, 10])).tolist() == [False, True, False, True, False]
    assert GroupSet().holds(np.array([1])).tolist() == [False]
    assert GroupSet(some.sorted_M, is_sorted=True).holds(np.array([9])).all()
