"""Walk through the maps of Freedoom in the ViZDoom engine: frames with depth and kinds.

A *walk* is a clip: frames in time order, `TICS` game tics (1/35 s each) apart, from one spot of one
map. The player is warped to a spot, sometimes meets an actor that was not there before, and walks;
a frame that shows nothing of use ends the walk.

What the engine's buffers hold (read in its source, then checked on its pictures):

  labels  0 wall or sky, 1 floor or ceiling, above 1 one value an object.
  depth   8 bits in steps of 7.16 map units. Walls stop at 255 x height / 480, here 102 or 740
          units, which is also the value of the sky. Floors and ceilings go on to 255; but where
          one is 5.5 to 10.9 units away, an unsigned subtraction wraps round and 193 or 194 is
          written where 0 is meant: under a ceiling too low to stand, on a ledge at eye level, and
          always for a player who was warped onto a solid thing and looks on from the ground.
"""

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.tasks import Kind

TICS = 4  # between two frames: 30 map units of walking, or up to 10 degrees of turning
LONGEST, SHORTEST = 16, 8  # frames a walk, but for the last: the longest sentence has 16 images
WIDTH, HEIGHT = 256, 192  # of the view, with 90 degrees across; its middle square is used
LIMIT = 255 * HEIGHT // 480  # depth of the sky, and of walls that are as far or farther
EYE = (25.0, 57.0)  # height of the eye over the floor when all is well: 41, bobbing


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A map of one of the two game files, or of a scenario that brings its own."""

    name: str  # as in folder names
    game: str
    lump: str
    scenario: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """n frames; everything uint8, H = HEIGHT."""

    rgb: np.ndarray  # [n, H, H, 3]
    depth: np.ndarray  # [n, H, H], in steps of 7.16 map units, walls and sky cut at LIMIT
    kinds: np.ndarray  # [n, H, H], values of Kind


def all_maps() -> list[Map]:
    """Return the 72 maps in a mixed order that never changes.

    Of the scenarios in the package, cig.wad kills the whole process when it is loaded, and most
    others are one plain room.
    """
    first = [f"E{e}M{m}" for e in range(1, 5) for m in range(1, 10)]
    second = [f"MAP{m:02d}" for m in range(1, 33)]
    rooms = ["deathmatch", "my_way_home", "health_gathering_supreme", "deadly_corridor"]
    maps = [
        *(Map(name=lump.lower(), game="freedoom1", lump=lump) for lump in first),
        *(Map(name=lump.lower(), game="freedoom2", lump=lump) for lump in second),
        *(Map(name=r.replace("_", ""), game="freedoom2", lump="map01", scenario=r) for r in rooms),
    ]
    return sorted(maps, key=lambda m: zlib.crc32(m.name.encode()))


ACTORS = {  # to be met; some are known to one game file only
    "freedoom1": ("Shotgun", "Chaingun", "PlasmaRifle", "Candelabra"),
    "freedoom2": ("ChaingunGuy", "HellKnight", "Revenant", "Arachnotron", "SuperShotgun"),
    "both": (
        *("DoomImp", "Demon", "ZombieMan", "ShotgunGuy", "Cacodemon", "LostSoul", "BaronOfHell"),
        *("Medikit", "GreenArmor", "BlueArmor", "Soulsphere", "RocketLauncher", "Backpack"),
        *("ExplosiveBarrel", "Column", "TallRedColumn", "BlueTorch", "RedTorch", "TechPillar"),
    ),
}
# Picking these up tints the screen; the last is the player.
AVOID = frozenset({"RadSuit", "InvulnerabilitySphere", "Infrared", "BlurSphere", "DoomPlayer"})


def start(place: Map, *, seed: int) -> Any:
    """Return a running game without window, sound, status bar, weapon or text."""
    import vizdoom

    folder = os.path.dirname(vizdoom.__file__)
    game = vizdoom.DoomGame()
    game.set_doom_game_path(os.path.join(folder, f"{place.game}.wad"))
    if place.scenario:
        game.set_doom_scenario_path(os.path.join(folder, "scenarios", f"{place.scenario}.wad"))
    game.set_doom_map(place.lump)
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{WIDTH}X{HEIGHT}"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_labels_buffer_enabled(True)
    game.set_objects_info_enabled(True)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_seed(seed)
    game.set_episode_timeout(0)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_render_decals(False)
    game.set_render_particles(False)
    game.set_render_effects_sprites(False)
    game.set_render_screen_flashes(False)
    game.set_render_messages(False)  # and the centre text "a secret is revealed":
    game.add_game_args("+sv_cheats 1 +cl_showsecretmessage 0 +con_midtime 0")
    button = vizdoom.Button
    game.set_available_buttons([button.MOVE_FORWARD, button.TURN_LEFT_RIGHT_DELTA])
    game.set_available_game_variables([vizdoom.GameVariable.VIEW_HEIGHT])
    game.init()
    return game


def walks(place: Map, *, frames: int, seed: int, dropped: Counter[str]) -> Iterator[Walk]:
    """Yield walks of one map until they hold `frames` frames, or give up after a bounded search.

    Unused frames are counted in `dropped` by reason. The same arguments give the same frames, byte
    by byte. The engine writes files into the working directory.
    """
    rng = random.Random(f"{seed} {place.name}")
    game = start(place, seed=rng.randrange(1 << 30))
    try:
        made = 0
        for spot in range(frames):
            if spot == 0 or game.is_episode_finished():
                game.new_episode()
                game.send_game_command("god")
                game.send_game_command("notarget")  # or the first monster ends the walk
            left = frames - made
            buffers, reason = _one_walk(
                game, place, rng, limit=LONGEST if left >= LONGEST + SHORTEST else left
            )
            if reason:
                dropped[reason] += 1
            # What this walk leaves to be made must be enough for another one.
            use = left if len(buffers) == left else min(len(buffers), left - SHORTEST)
            if use < min(SHORTEST, left):
                if buffers:
                    dropped["walk too short"] += len(buffers)
                continue
            rgb, depth, labels = (np.stack(b) for b in zip(*buffers[:use], strict=True))
            made += len(rgb)
            yield Walk(rgb=rgb, depth=mend(depth, labels), kinds=kinds_of(labels, depth))
            if made >= frames:
                return
    finally:
        game.close()


def _one_walk(
    game: Any, place: Map, rng: random.Random, *, limit: int
) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], str]:
    """Return rgb, depth and labels of each frame of one walk and, if it ended early, why."""
    spots = [o for o in game.get_state().objects if o.name not in AVOID]
    if spots:
        spot = rng.choice(spots)
        x, y = (int(v) + rng.randint(-40, 40) for v in (spot.position_x, spot.position_y))
        game.send_game_command(f"warp {x} {y}")
    game.set_action([0, rng.uniform(-180, 180)])
    game.advance_action(1, False)  # the summoned actor is put in front of the turned player
    if rng.random() < 0.6:
        game.send_game_command(f"summon {rng.choice(ACTORS['both'] + ACTORS[place.game])}")
    game.make_action([0, 0], 8)  # the player falls to the floor, the fog of the warp goes
    middle = slice((WIDTH - HEIGHT) // 2, (WIDTH + HEIGHT) // 2)
    buffers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    turn, steps = 0.0, 0
    while len(buffers) < limit:
        state = game.get_state()
        reason = unusable(state)
        if reason:
            return buffers, reason
        screen, depth, labels = state.screen_buffer, state.depth_buffer, state.labels_buffer
        buffers.append(tuple(b[:, middle].copy() for b in (screen, depth, labels)))
        ahead = float(np.median(depth[80:112, 96:160]))
        if steps == 0:
            turn, steps = rng.choice((0.0, 0.0, 0.8, -0.8, 1.6, -1.6)), rng.randint(3, 6)
        steps -= 1
        if ahead < 12.0:  # about 100 units: turn away, and keep to that side
            turn, steps = (2.5 if turn >= 0.0 else -2.5), max(steps, 1)
        game.make_action([float(ahead >= 9.0), turn], TICS)
    return buffers, ""


def unusable(state: Any) -> str:
    """Say why a frame is not worth keeping, or nothing."""
    if state is None:
        return "map ended"
    if not EYE[0] <= state.game_variables[0] <= EYE[1]:
        return "player stuck"
    if any(label.object_name == "TeleportFog" for label in state.labels):
        return "teleport fog"
    rgb, labels = state.screen_buffer[::4, ::4], state.labels_buffer[::4, ::4]
    if rgb.mean() < 16.0:
        return "dark"
    if rgb.std() < 10.0:
        return "flat"
    if (labels == 0).mean() > 0.9 and np.median(state.depth_buffer[::4, ::4]) < 20.0:
        return "only a wall"
    if ((labels == 0) & (state.depth_buffer[::4, ::4] >= LIMIT)).mean() > 0.6:
        return "only sky"
    if (labels > 1).mean() > 0.5:
        return "only an object"
    return ""


def mend(depth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Undo the wrap of near floors and ceilings: 193 and 194 become 0. uint8 [n, H, W].

    Only away from the horizon: there a plane that far off would have to lie 300 map units above or
    below the eye, while close to it a wrapped one would lie within 3.
    """
    rows = np.abs(np.arange(depth.shape[1]) - depth.shape[1] / 2)[:, None]
    wrapped = (labels == 1) & ((depth == 193) | (depth == 194)) & (rows > 28)
    return np.where(wrapped, 0, depth).astype(np.uint8)


def kinds_of(labels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Name the pixels of the engine's labels, uint8 [n, H, W] -> values of Kind.

    The view is level: what is above the horizon is ceiling or sky, not floor. Sky and a far wall
    have the same label and depth; where the ceiling runs on to it from above, it is a wall. Sky
    that goes on below the horizon (a floor of sky, the world's edge) stays sky.
    """
    horizon = labels.shape[1] // 2
    upper = (np.arange(labels.shape[1]) < horizon)[:, None]
    far = (labels == 0) & (depth >= LIMIT)
    far_ceiling = (labels == 1) & (depth >= LIMIT * 9 // 10)
    far_wall = np.zeros_like(far)
    for y in range(1, horizon):
        above = far_ceiling[:, y - 1] | far_wall[:, y - 1]
        far_wall[:, y] = above & (far[:, y] | (labels[:, y] > 1))  # on behind objects
    sky = far & ~far_wall & upper
    for y in range(horizon, labels.shape[1]):
        sky[:, y] = sky[:, y - 1] & far[:, y]
    kinds = np.full(labels.shape, Kind.OBJECT, np.uint8)
    kinds[labels == 0] = Kind.WALL
    kinds[sky] = Kind.SKY
    kinds[labels == 1] = Kind.FLOOR
    kinds[(labels == 1) & upper] = Kind.CEILING
    return kinds
