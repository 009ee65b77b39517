// Starts the page: reads what build.py wrote into it, and fills its sections.

const data = JSON.parse(document.getElementById("data").textContent);
document.getElementById("summary").textContent = data.summary;
showRun(data);
showForward(data);
if (data.film) showReverse(data);
showJudged(data);
showLive(data);
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
