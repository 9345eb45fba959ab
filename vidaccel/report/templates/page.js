"use strict";
(() => {
  const button = document.getElementById("play");
  const groups = [...document.querySelectorAll(".clip")].map((clip) => [...clip.querySelectorAll("video")]);
  const all = groups.flat();
  const lag = 0.06; // seconds; less than a frame at 16 per second
  let playing = false;

  // players drift apart, most of all where a loop begins again; the first of each group sets the time
  const align = () => {
    for (const [first, ...others] of groups) {
      for (const other of others) {
        const apart = Math.abs(other.currentTime - first.currentTime);
        if (Math.min(apart, Math.abs(first.duration - apart)) > lag) other.currentTime = first.currentTime;
      }
    }
    if (playing) setTimeout(align, 200);
  };

  const show = () => {
    button.textContent = playing ? "Pause all" : "Play all";
    button.setAttribute("aria-pressed", String(playing));
  };

  button.addEventListener("click", async () => {
    playing = !playing;
    show();
    if (!playing) {
      for (const video of all) video.pause();
      for (const [first, ...others] of groups) for (const other of others) other.currentTime = first.currentTime;
      return;
    }
    for (const video of all) video.currentTime = 0;
    const started = await Promise.allSettled(all.map((video) => video.play()));
    if (playing && started.every((one) => one.status === "rejected")) {
      playing = false;
      show();
      return;
    }
    align();
  });
})();
