// Skeletons that move: each figure of class "player" holds its clip as JSON and its first frame as SVG.
(() => {
  "use strict";
  const FRAMES_PER_SECOND = 15;
  const RADIANS_PER_PIXEL = 0.01;
  const RADIANS_PER_KEY = Math.PI / 24;
  const LONGEST_HEAD = 60; // millimetres
  const STEEPEST = Math.PI / 2;

  function start(player) {
    const clip = JSON.parse(player.querySelector("script").textContent);
    const [svg, button, slider, output, select] = ["svg", "button", "input", "output", "select"].map((tag) =>
      player.querySelector(tag));
    const bodies = [...svg.querySelectorAll("g")].map((group) => group.querySelectorAll("path"));
    let [yaw, pitch] = clip.view;
    let timer = null;

    function project(values, at, centre) {
      const x = values[at] - centre[0], y = values[at + 1] - centre[1], z = values[at + 2] - centre[2];
      const right = Math.cos(yaw) * x - Math.sin(yaw) * z;
      const depth = Math.sin(yaw) * x + Math.cos(yaw) * z;
      return [right, Math.sin(pitch) * depth - Math.cos(pitch) * y];
    }

    const text = (point) => `${Math.round(point[0])} ${Math.round(point[1])}`;

    function arrow(from, along) {
      const to = [from[0] + along[0], from[1] + along[1]];
      const part = Math.min(0.28, LONGEST_HEAD / Math.hypot(...along));
      const head = [0.8, -0.8].map((side) => [
        to[0] - part * (along[0] + side * along[1]), to[1] - part * (along[1] - side * along[0])]);
      return `M${text(from)}L${text(to)}M${text(head[0])}L${text(to)}L${text(head[1])}`;
    }

    function draw() {
      const frame = Number(slider.value);
      const name = select.value;
      const vectors = clip.vectors[name];
      bodies.forEach(([bones, dots, arrows], person) => {
        const begin = (frame * clip.persons + person) * clip.joints * 3;
        const points = [];
        let present = false;
        for (let joint = 0; joint < clip.joints; joint++) {
          const at = begin + 3 * joint;
          present = present || Boolean(clip.positions[at] || clip.positions[at + 1] || clip.positions[at + 2]);
          points.push(project(clip.positions, at, clip.centre));
        }
        let bonePath = "", dotPath = "", arrowPath = "";
        for (let joint = 0; present && joint < clip.joints; joint++) {
          const parent = clip.parents[joint];
          if (parent !== joint) bonePath += `M${text(points[parent])}L${text(points[joint])}`;
          if (!vectors) {
            dotPath += `M${text(points[joint])}h0`;
            continue;
          }
          const along = project(vectors, begin + 3 * joint, [0, 0, 0]);
          if (along[0] || along[1]) arrowPath += arrow(points[clip.starts[name][joint]], along);
        }
        bones.setAttribute("d", bonePath);
        bones.setAttribute("stroke", vectors ? "var(--body)" : clip.colours.joint);
        dots.setAttribute("d", dotPath);
        arrows.setAttribute("d", arrowPath);
        arrows.setAttribute("stroke", clip.colours[name]);
      });
      output.textContent = `${frame + 1} / ${clip.frames}`;
    }

    function stop() {
      clearInterval(timer);
      timer = null;
      button.textContent = "Play";
    }

    function toggle() {
      if (timer !== null) return stop();
      button.textContent = "Pause";
      timer = setInterval(() => {
        slider.value = (Number(slider.value) + 1) % clip.frames;
        draw();
      }, 1000 / FRAMES_PER_SECOND);
    }

    function turn(right, down) {
      yaw += right;
      pitch = Math.min(STEEPEST, Math.max(-STEEPEST, pitch + down));
      draw();
    }

    button.addEventListener("click", toggle);
    slider.addEventListener("input", () => { stop(); draw(); });
    select.addEventListener("change", draw);
    svg.addEventListener("pointerdown", (event) => svg.setPointerCapture(event.pointerId));
    svg.addEventListener("pointermove", (event) => {
      if (svg.hasPointerCapture(event.pointerId)) {
        turn(-RADIANS_PER_PIXEL * event.movementX, RADIANS_PER_PIXEL * event.movementY);
      }
    });
    svg.addEventListener("keydown", (event) => {
      const turns = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (turns) turn(...turns.map((each) => each * RADIANS_PER_KEY));
      else if (event.key === " ") toggle();
      else return;
      event.preventDefault();
    });
    for (const controls of player.querySelectorAll(".controls")) controls.hidden = false;
  }

  document.querySelectorAll(".player").forEach(start);
})();
