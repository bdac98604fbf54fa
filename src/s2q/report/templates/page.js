"use strict";
(() => {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const playAll = document.getElementById("play-all");
  const speed = document.getElementById("speed");
  const difference = document.getElementById("show-difference");
  const theme = document.getElementById("theme");
  const wipe = document.getElementById("wipe");

  class Player {
    constructor(root) {
      this.root = root;
      this.fps = Number(root.dataset.fps);
      this.frames = Number(root.dataset.frames);
      this.videos = [...root.querySelectorAll("video")];
      this.toggle = root.querySelector(".toggle");
      this.range = root.querySelector(".transport input");
      this.output = root.querySelector("output");
      this.wanted = !still;
      this.visible = true;
      this.screens = [...root.querySelectorAll("canvas")];
      for (const video of this.videos) {
        video.removeAttribute("controls");
        video.addEventListener("error", () => this.fail());
        if (video.error) this.fail();
        if (this.screens.length) for (const event of ["seeked", "loadeddata"]) video.addEventListener(event, () => this.drawTwice());
      }
      this.toggle.addEventListener("click", () => this.want(!this.wanted));
      this.range.addEventListener("input", () => this.seek(Number(this.range.value)));
      for (const button of root.querySelectorAll(".step")) {
        button.addEventListener("click", () => this.step(Number(button.dataset.step)));
      }
      this.position = root.querySelector(".wipe-position");
      this.position.addEventListener("input", () => this.place());
      for (const figure of root.querySelectorAll("figure.student")) this.listen(figure);
      this.place();
      this.apply();
    }
    listen(figure) {
      const picture = figure.querySelector("video, canvas");
      const move = (event) => {
        if (!wipe.checked || (event.type === "pointermove" && event.buttons !== 1)) return;
        const box = picture.getBoundingClientRect();
        this.position.value = String(100 * (event.clientX - box.left) / box.width);
        this.place();
      };
      for (const event of ["pointerdown", "pointermove"]) figure.addEventListener(event, move);
      figure.addEventListener("dragstart", (event) => event.preventDefault());
      new ResizeObserver(() => figure.style.setProperty("--wipe-height", `${picture.clientHeight}px`)).observe(picture);
    }
    fail() {
      if (this.root.querySelector(".unplayable")) return;
      const note = document.createElement("p");
      note.className = "unplayable";
      note.setAttribute("role", "alert");
      note.textContent = "This browser cannot decode a video of this prompt (H.264 in MP4); its frames are under “All frames at once”.";
      this.root.querySelector("h3").after(note);
    }
    place() {
      this.root.style.setProperty("--wipe", `${this.position.value}%`);
      this.draw();
    }
    step(frames) { this.seek((Number(this.range.value) + frames + this.frames) % this.frames); }
    get master() { return this.videos[0]; }
    get frame() {
      return Math.max(0, Math.min(this.frames - 1, Math.floor(this.master.currentTime * this.fps + 1e-3)));
    }
    want(playing) { this.wanted = playing; this.apply(); refresh(); }
    seek(frame) {
      this.wanted = false;
      this.apply();
      this.rest(frame);
      refresh();
    }
    rest(frame) {
      for (const video of this.videos) video.currentTime = (frame + 0.5) / this.fps;
      this.show(frame);
    }
    apply() {
      const run = this.wanted && this.visible;
      this.toggle.setAttribute("aria-pressed", String(this.wanted));
      this.toggle.setAttribute("aria-label", this.wanted ? "Pause" : "Play");
      for (const video of this.videos) {
        video.playbackRate = Number(speed.value);
        if (run) video.play().catch((error) => { if (error.name === "NotAllowedError") this.want(false); });
        else video.pause();
      }
      if (!this.wanted && this.master.readyState) this.rest(this.frame);
    }
    drawTwice() {  // the new frame may come to the screen after its event
      this.draw();
      requestAnimationFrame(() => this.draw());
    }
    draw() {
      const apart = difference.checked;
      for (const screen of this.screens) {
        const { width, height } = screen;
        const context = screen.getContext("2d");
        const tile = (corner, shown) => {
          const [x, y] = corner.split(" ").map(Number);
          context.drawImage(this.master, x, y, shown, height, 0, 0, shown, height);
        };
        tile(apart ? screen.dataset.difference : screen.dataset.corner, width);
        const uncovered = Math.round((width * this.position.value) / 100);
        if (wipe.checked && screen !== this.screens[0] && uncovered) tile(this.screens[0].dataset.corner, uncovered);
      }
    }
    show(frame) {
      this.range.value = String(frame);
      this.output.textContent = `${frame + 1} / ${this.frames}`;
    }
    follow() {
      if (!this.wanted || !this.visible || this.master.seeking) return;
      const now = this.master.currentTime;
      for (const video of this.videos.slice(1)) {
        if (!video.seeking && Math.abs(video.currentTime - now) > 0.3 / this.fps) video.currentTime = now;
      }
      const frame = this.frame;
      if (frame !== this.last) { this.last = frame; this.show(frame); this.draw(); }
    }
  }

  const players = [...document.querySelectorAll(".player")].map((root) => new Player(root));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const player = players.find((candidate) => candidate.root === entry.target);
      player.visible = entry.isIntersecting;
      player.apply();
    }
  });
  players.forEach((player) => watch.observe(player.root));

  function refresh() {
    const any = players.some((player) => player.wanted);
    playAll.setAttribute("aria-pressed", String(any));
    playAll.querySelector(".text").textContent = any ? "Pause all" : "Play all";
  }
  function tick() { players.forEach((player) => player.follow()); requestAnimationFrame(tick); }

  playAll.addEventListener("click", () => {
    const wanted = !players.some((player) => player.wanted);
    for (const player of players) {
      if (wanted) for (const video of player.videos) video.currentTime = 0;
      player.want(wanted);
    }
  });
  speed.addEventListener("change", () => players.forEach((player) => player.apply()));
  difference.addEventListener("change", () => {
    document.body.classList.toggle("no-difference", !difference.checked);
    players.forEach((player) => player.draw());
  });
  wipe.addEventListener("change", () => {
    document.body.classList.toggle("wipe", wipe.checked);
    players.forEach((player) => player.draw());
  });
  const keys = {
    " ": () => playAll.click(),
    ArrowLeft: () => players.filter((player) => player.visible).forEach((player) => player.step(-1)),
    ArrowRight: () => players.filter((player) => player.visible).forEach((player) => player.step(1)),
    w: () => wipe.click(),
    d: () => difference.click(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("button, input, select, summary, a, video, textarea, [tabindex]")) return;
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  if (theme) theme.addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  // A region that scrolls can be reached by the tab key and has the name of its section.
  const regions = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const scrolls = target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight;
      const heading = target.closest("details, figure, section").querySelector("summary, h2, h3");
      const name = heading ? heading.textContent : "Table";
      for (const [attribute, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", name]]) {
        if (scrolls) target.setAttribute(attribute, value);
        else target.removeAttribute(attribute);
      }
    }
  });
  for (const region of document.querySelectorAll(".scroll, pre")) regions.observe(region);
  refresh();
  requestAnimationFrame(tick);
})();
